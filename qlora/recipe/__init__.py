"""Recipes: read, resolved, checked, planned, suggested, and converted from other trainers."""
