"""Training: optimizer, the pure step, its parallel forms, and the loop."""
