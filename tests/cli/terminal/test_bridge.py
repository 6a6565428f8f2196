"""Commands built from functions: arguments, options, conversions and results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.cli.terminal.bridge import Command, CommandGroup, FromText, KeywordOptions


@dataclass(frozen=True)
class Sum:
    """The result of the command."""

    total: int
    fields: dict[str, Any]
    exit_code: int = 1


def add(
    first: int,
    others: Sequence[int] = (),
    *,
    weights: Annotated[
        Sequence[int], FromText(str, lambda text: [*map(int, text.split(","))])
    ] = (),
    negative: bool = False,
    **fields: Annotated[
        Any, KeywordOptions({"name": Annotated[str, typer.Option(help="A name.")]}, settings="Any.")
    ],
) -> Sum:
    """Add numbers.

    Args:
        first: The first number.
        others: Further numbers.
        weights: Weights, e.g. 1,2.
        negative: Change the sign.

    Returns:
        The sum.
    """
    total = sum([first, *others, *weights])
    return Sum(-total if negative else total, fields)


def show(found: Sum, negative: bool) -> None:
    print(found.total, negative)


@pytest.fixture
def group() -> CommandGroup:
    made = CommandGroup("Numbers.", rich_markup_mode=None)
    made.add(Command(add, show))
    made.add(Command(lambda: None, has_json=False, name="nothing"))
    return made


def test_function_becomes_command(group: CommandGroup) -> None:
    text = CliRunner().invoke(group, ["add", "--help"]).stdout
    for part in ("The first number.", "--weights <str>", "--negative ", "--name <str>", "--json"):
        assert part in text
    assert "Returns" not in text
    given = ["add", "1", "2", "--weights", "3,4", "--negative", "--name", "x", "--set", "a.b=2"]
    done = CliRunner().invoke(group, given)
    assert (done.exit_code, done.stdout) == (1, "-10 True\n")
    done = CliRunner().invoke(group, [*given, "--json"])
    assert json.loads(done.stdout) == {
        "total": -10, "fields": {"name": "x", "a.b": 2}, "exit_code": 1
    }  # fmt: skip


def test_each_option_has_a_short_help() -> None:
    def commands(node: Any, path: str) -> list[tuple[str, Any]]:
        children = getattr(node, "commands", None)
        if not children:
            return [(path, node)]
        return [
            each for name, child in children.items() for each in commands(child, f"{path} {name}")
        ]

    for path, command in commands(typer.main.get_command(app), "luthier"):
        for each in command.params:
            if not path.startswith(("luthier admin", "luthier worker")):
                assert 0 < len(each.help or "") <= 64, (path, each.name)
