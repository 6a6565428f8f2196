"""``luthier plugins``: what other installed packages add."""

from __future__ import annotations

from dataclasses import asdict

from luthier.cli.console import print_json, print_text
from luthier.cli.options import Json


def plugins(json_: Json = False) -> None:
    """List installed plugins."""
    from luthier.adaptations import ADAPTATIONS
    from luthier.graders import GRADERS
    from luthier.models.backends import BACKENDS
    from luthier.models.catalog import CATALOG
    from luthier.objectives import OBJECTIVES
    from luthier.trackers import TRACKERS

    tables = (OBJECTIVES, ADAPTATIONS, GRADERS, CATALOG, BACKENDS, TRACKERS)
    found = [plugin for table in tables for plugin in table.plugins()]
    if json_:
        print_json({"plugins": [asdict(plugin) for plugin in found]})
        return
    for plugin in found:
        state = f"cannot be used: {plugin.problem}" if plugin.problem else "usable"
        print_text(f"{plugin.group}  {plugin.name}  ({plugin.package})  {state}")
    if not found:
        print_text("No installed package adds anything. docs/guide/plugins.md shows how one does.")
