"""What a trained model is worth: losses over a split, decoded text, few-shot probes."""
