"""Base models: catalogue, loading, forward passes over token trees, and saving."""
