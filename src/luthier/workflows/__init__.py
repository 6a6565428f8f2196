"""Workflows with trainings: pipelines, searches, distillation, estimates, advice.

Workflows use the engine; the engine does not import workflows.
"""
