"""Image networks that transformers lacks."""
