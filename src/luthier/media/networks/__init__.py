"""Networks for images that transformers does not have."""
