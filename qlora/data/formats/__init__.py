"""One file per format: which rows it recognises by their columns, and the messages it reads out of one."""
