"""Tests of moejax.ahead."""
