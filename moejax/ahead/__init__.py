"""A run on TPUs, known without one: it is compiled for them, and what comes out is read."""
