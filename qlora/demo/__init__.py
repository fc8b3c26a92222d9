"""The embedded demo of `qlora demo`: a small base model, its data set and its recipe (made by scripts/demo/)."""
