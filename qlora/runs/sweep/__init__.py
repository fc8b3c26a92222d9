"""Sweeps: several variants of one recipe, trained at once on one base model.

A variant is a recipe with some settings changed. The variants take their steps in turn, each with its own adapter, and
write the run folders that `qlora train` of their recipes would write; on a CPU bit for bit.
"""
