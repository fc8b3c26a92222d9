"""Faults and the judges of what they leave: used by the tests at a small size, by `make faults` at full size."""
