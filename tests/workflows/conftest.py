"""The short run of the engine's tests."""

from short_runs import recipe, rows

__all__ = ["recipe", "rows"]
