"""The command line: one small module per command, which parses, calls and prints."""

from qlora.cli import (
    advise,
    chat,
    check,
    combine,
    completion,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    init,
    inspect,
    plan,
    preview,
    push,
    recipes,
    report,
    resize,
    schema,
    sensitivity,
    sweep,
    train,
)
from qlora.cli.app import app, main

__all__ = [
    "advise", "app", "chat", "check", "combine", "completion", "convert", "demo", "doctor", "evaluate", "export",
    "generate", "init", "inspect", "main", "plan", "preview", "push", "recipes", "report", "resize", "schema",
    "sensitivity", "sweep", "train",
]  # fmt: skip
