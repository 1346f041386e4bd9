"""Checkpoints on disk, one file per format."""
