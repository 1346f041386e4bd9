"""One benchmark per file: python -m experiments.benchmarks lists them."""
