"""Several processes train one model: they start together, agree, and notice a lost process."""
