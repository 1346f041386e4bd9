"""Tests of moejax.aot."""
