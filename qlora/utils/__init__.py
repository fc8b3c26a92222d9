"""What every package may use: registry, atomic files, redaction, sandbox, progress."""
