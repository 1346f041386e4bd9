"""Tests of moejax.checkpoints."""
