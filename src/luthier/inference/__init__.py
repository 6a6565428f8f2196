"""Answering with models, and writing them for other software."""
