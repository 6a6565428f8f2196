"""Evaluation: scores, baselines, significance, and verification of saved models."""
