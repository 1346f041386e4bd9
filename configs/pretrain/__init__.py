"""Dense runs, the parents of all others."""
