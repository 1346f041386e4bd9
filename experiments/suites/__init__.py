"""One file per suite; each defines SCALES and get_suite(scale)."""
