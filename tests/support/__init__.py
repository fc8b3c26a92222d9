"""Helpers of several tests: tiny models, small runs, child processes, fault injection."""
