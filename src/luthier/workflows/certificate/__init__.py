"""Certificates of models: creation, model cards and verification."""
