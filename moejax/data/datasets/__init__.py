"""Sources of examples, one file each, with load(config) -> Source; registry.py names them."""
