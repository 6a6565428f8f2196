"""Distillation: a student learns from a teacher or from itself, one file per objective."""
