"""Suites of runs, their tables and verdicts, and benchmarks; moejax imports nothing from here."""
