"""Base models: which there are, how they are loaded, run over token trees, and saved."""
