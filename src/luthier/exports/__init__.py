"""Models in the formats of other software."""
