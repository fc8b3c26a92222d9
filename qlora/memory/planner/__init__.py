"""Memory predicted from shapes alone, without torch and before a weight is read."""
