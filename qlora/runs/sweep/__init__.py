"""Several variants of one recipe, trained at once on one resident base.

A variant is a recipe with some settings of its own; it steps in turn with the others, in its own adapter, and leaves
the folder that `qlora train` of its recipe would leave, bit for bit on a CPU.
"""
