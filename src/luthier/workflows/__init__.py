"""What is done with trainings: pipelines, searches, distillation, estimates, advice.

These use the engine as its callers do, and the engine knows none of them.
"""
