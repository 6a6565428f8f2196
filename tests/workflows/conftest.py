"""The short run and its rows that tests of the engine use, too."""

from short_runs import recipe, rows

__all__ = ["recipe", "rows"]
