"""Certificates of models: creation, model cards, signatures and verification."""
