"""moejax: sparse upcycling in JAX, from a dense checkpoint to a Mixture-of-Experts and back."""
