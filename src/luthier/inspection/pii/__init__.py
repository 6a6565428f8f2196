"""Personal data and secrets inside text: where they stand, and of what kind they are."""

from __future__ import annotations

from luthier.inspection.pii.find import REGIONS, Finder, mask, masked
from luthier.inspection.pii.spans import KINDS, SECRETS, Kind, Span

__all__ = ["KINDS", "REGIONS", "SECRETS", "Finder", "Kind", "Span", "mask", "masked"]
