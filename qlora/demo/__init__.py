"""The embedded base, its instruction set and its recipe, and the scripts that made them: what `qlora demo` works on."""
