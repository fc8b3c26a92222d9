"""Records with file:line from files, folders, globs and the hub."""
