"""Runs that fine-tune a parent, dense or sparse, on a task."""
