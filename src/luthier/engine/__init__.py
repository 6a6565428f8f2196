"""Training: from a recipe to a custom model."""
