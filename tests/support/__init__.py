"""What several tests share: tiny models, small runs, child processes, faults."""
