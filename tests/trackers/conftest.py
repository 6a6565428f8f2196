"""Short runs whose metrics go to trackers."""

from short_runs import recipe, rows

__all__ = ["recipe", "rows"]
