"""Base models: catalogue, loading, forward passes over token trees, and saving."""

DEFAULT_BASE = "smollm2-135m-instruct"
"""Base model without a choice by the user or by the rows: the smallest decoder of the catalogue."""
TEXT_ENCODER = "all-minilm-l6-v2"
"""Base model for rows without a text to generate, and encoder of embeddings."""
WORD_CLASSIFIER = "fasttext"
"""Text classifier on words and word pairs, for any language that separates words by spaces."""
