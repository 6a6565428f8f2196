"""``luthier plugins``: entry points of installed packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import print_text

if TYPE_CHECKING:
    from luthier.plugins import Plugin


@dataclass(frozen=True)
class Plugins:
    """Plugins of installed packages."""

    plugins: list[Plugin]


def plugins() -> Plugins:
    """List installed plugins."""
    from luthier.adaptations import ADAPTATIONS
    from luthier.cli.app import COMMANDS
    from luthier.graders import GRADERS
    from luthier.models.catalog import CATALOG
    from luthier.models.decoding.backends import BACKENDS
    from luthier.objectives import OBJECTIVES
    from luthier.trackers import TRACKERS

    tables = (OBJECTIVES, ADAPTATIONS, GRADERS, CATALOG, BACKENDS, TRACKERS, COMMANDS)
    return Plugins([plugin for table in tables for plugin in table.plugins()])


def show_plugins(found: Plugins) -> None:
    """Print a line for each plugin."""
    for plugin in found.plugins:
        state = f"unusable: {plugin.problem}" if plugin.problem else "usable"
        print_text(f"{plugin.group}  {plugin.name}  ({plugin.package})  {state}")
    if not found.plugins:
        print_text("No plugins are installed. See docs/guide/plugins.md")
