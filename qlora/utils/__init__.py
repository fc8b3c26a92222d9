"""Utilities for every package: registry, atomic files and folders, redaction, sandbox, machine, progress."""
