"""Short runs of models in the store."""

from short_runs import recipe, rows

__all__ = ["recipe", "rows"]
