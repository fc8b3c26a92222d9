"""Strict configuration: YAML and overrides -> frozen typed sections, every error at the line of its setting.

A package declares its settings as a Section next to its table of kinds: `setting` gives each setting its default, one
line of documentation and its limits. No other package reads YAML or validates settings.
"""

from qlora.config.locations import Location, Path, Problem, dotted, raise_problems
from qlora.config.read_text import decode, read_text
from qlora.config.sections import REQUIRED, Between, KindOf, OneOrMany, Section, Shorthand, Validator, setting, validate
from qlora.config.yaml_document import Document, parse, write

__all__ = [
    "REQUIRED",
    "Between",
    "Document",
    "KindOf",
    "Location",
    "OneOrMany",
    "Path",
    "Problem",
    "Section",
    "Shorthand",
    "Validator",
    "decode",
    "dotted",
    "parse",
    "raise_problems",
    "read_text",
    "setting",
    "validate",
    "write",
]
