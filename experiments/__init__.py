"""Suites of runs that make tables; nothing in moejax imports this."""
