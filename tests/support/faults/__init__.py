"""Fault injection, and checks of what a fault leaves: small in the test suite, full size in `make faults`."""
