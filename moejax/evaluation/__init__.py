"""How good a trained model is: losses over a split, scores of decoded text, few-shot probes."""
