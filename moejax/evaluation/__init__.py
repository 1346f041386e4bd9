"""Measures a trained model: losses over a split, scores of decoded text, few-shot probes."""
