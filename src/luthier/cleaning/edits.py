"""Every edit, in the order in which they are applied to a row; to add one, add a line."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.cleaning.cut import SplitLong, Truncate
from luthier.cleaning.edit import Edit, Setting
from luthier.cleaning.redact import Redact
from luthier.cleaning.strip import Strip

_KINDS: tuple[type[Edit], ...] = (Strip, Redact, SplitLong, Truncate)
EDITS: Mapping[str, type[Edit]] = {kind.name: kind for kind in _KINDS}
"""By name. Hidden characters go first, as they may stand inside an address or a number."""


def edits_for(setting: Setting) -> list[Edit]:
    """New edits as the plan asks for them."""
    return [kind.of(setting) for name, kind in EDITS.items() if name in setting.plan.edits]
