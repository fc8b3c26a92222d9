"""Strict reading: YAML and overrides -> frozen typed sections, every error at the line of its setting.

A room declares its settings as a Section beside its table: `setting` gives each its default, its one line of
documentation and its limits, in one place. Nothing else in the house reads YAML or validates settings.
"""

from qlora.config.locations import Path, Place, Problem, complain, dotted
from qlora.config.read_text import decode, read_text
from qlora.config.sections import REQUIRED, Between, KindOf, OneOrMany, Rule, Section, Short, setting, validate
from qlora.config.yaml_document import Document, parse, write

__all__ = [
    "REQUIRED",
    "Between",
    "Document",
    "KindOf",
    "OneOrMany",
    "Path",
    "Place",
    "Problem",
    "Rule",
    "Section",
    "Short",
    "complain",
    "decode",
    "dotted",
    "parse",
    "read_text",
    "setting",
    "validate",
    "write",
]
