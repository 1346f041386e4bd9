"""Tests of moejax.surgery."""
