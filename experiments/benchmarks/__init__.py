"""Times measured side by side, one benchmark per file."""
