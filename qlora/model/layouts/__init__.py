"""Layouts: where each tensor of a model lies in its checkpoint, by key, expert, rows and transposition, and back."""
