"""One file per format: the columns that identify it, and how it reads the messages of a record."""
