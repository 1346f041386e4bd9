"""Surgery: tree -> tree, by rules on flat paths; no model, no training."""
