"""Inference with stored models."""
