"""Short runs with trackers."""

from short_runs import recipe, rows

__all__ = ["recipe", "rows"]
