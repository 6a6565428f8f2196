"""Certificates of models: creation, model cards, pages, signatures and verification."""
