"""Records from files, folders, globs and the hub, each with its place in the source."""
