"""Sparse runs that start from a dense parent."""
