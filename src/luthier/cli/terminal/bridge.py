"""Typer commands built from the signatures of public functions.

A command is a function such as :func:`luthier.tune`, and ``app.py`` lists the functions. The bridge
reads each function as follows:

- A parameter before ``*`` is an argument, and a keyword-only parameter is an option.
- The entry of a parameter under ``Args:`` is the help text.
- ``reporter`` is no option: the terminal's progress display is passed.
- ``**keywords`` with :class:`KeywordOptions` are options and ``--set KEY=VALUE``.
- ``Annotated`` types add what a signature cannot say: another flag, bounds, or :class:`FromText`.

The result goes to the command's renderer, and with ``--json`` to standard output.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo, OptionInfo

from luthier.cli.terminal.console import (
    NO_WRAP,
    check_processes,
    errors,
    extra,
    print_json,
    train_in_other_process,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
_SECTION = re.compile(r"^(?:Args|Returns|Raises):$", re.MULTILINE)
_ENTRY = re.compile(r"^    \*{0,2}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class FromText:
    """Conversion of a parameter: type on the command line, and function to the Python value."""

    type: Any
    convert: Callable[[Any], Any] = lambda value: value
    empty: str = ""
    """Option for keys of the parameter without a value, such as ``--ignore COLUMN``."""
    empty_help: str = ""


@dataclass(frozen=True)
class KeywordOptions:
    """Options for the entries of ``**keywords``."""

    options: Mapping[str, Any]
    """Annotated types with help texts, by keyword."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""
    """Help text of ``--set KEY=VALUE`` for entries by dotted name; empty for no option."""


@dataclass(frozen=True)
class Command:
    """Public function with the renderer of the result."""

    function: Callable[..., Any]
    show: Callable[..., None] | None = None
    """Renderer, called with the result and each option in the renderer's signature."""
    name: str | None = None
    shares_work: bool = False
    """Whether the processes of a launcher (torchrun, for example) run the command together."""
    has_json: bool = True

    @property
    def command(self) -> str:
        """Return the name on the command line."""
        return self.name or self.function.__name__.replace("_", "-")

    def typer_function(self, extra_name: str) -> Callable[..., None]:
        """Return a function for typer; ``extra_name`` is the required extra of the package."""
        parameters = _Parameters(self.function)

        def run(**options: Any) -> None:
            as_json = options.pop("json_", False)
            with errors(as_json), extra(extra_name):
                check_processes(self.shares_work)
                result = self.call(parameters.keywords(options))
                if as_json:
                    print_json(plain(result))
                else:
                    self.render(result, options)
                raise typer.Exit(getattr(result, "exit_code", 0))

        run.__name__ = self.function.__name__
        # The help text is the docstring without its sections, so that both cannot differ.
        text = _SECTION.split(inspect.getdoc(self.function) or "")[0]
        run.__doc__ = text.strip().replace("``", "`")
        shown = [*parameters.shown]
        if self.has_json:
            shown.append(_keyword("json_", Json, False))
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return run

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the options that the words of a command line name, before conversion."""
        group = CommandGroup("")
        group.add(self)
        command: Any = typer.main.get_command(group)
        context = command.make_context(self.command, [*words])
        named = context.get_parameter_source
        return {
            name: value
            for name, value in context.params.items()
            if named(name).name == "COMMANDLINE"
        }

    def call(self, keywords: dict[str, Any]) -> Any:
        """Call the function, with a display of progress."""
        if "reporter" not in inspect.signature(self.function).parameters:
            return self.function(**keywords)
        # Under a launcher, one process alone prints.
        if self.shares_work and train_in_other_process(lambda: self.function(**keywords)):
            raise typer.Exit(0)
        from luthier.cli.terminal.progress import LiveReporter

        with LiveReporter(keywords.get("resume", False)) as reporter:
            return self.function(**keywords, reporter=reporter)

    def render(self, result: Any, options: Mapping[str, Any]) -> None:
        """Print a result; the renderer gets the options of its signature."""
        if self.show is not None:
            wanted = [*inspect.signature(self.show).parameters][1:]
            self.show(result, **{name: options.get(name) for name in wanted})


class _Parameters:
    """Parameters of a function for typer, and the conversion back to keywords."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.shown: list[inspect.Parameter] = []
        """Arguments, options of keywords, then options of the function's parameters."""
        self._convert: dict[str, Callable[[Any], Any]] = {}
        self._empty: dict[str, str] = {}
        """Parameter by the option for keys without a value."""
        self._settings = False
        text = _SECTION.split(inspect.getdoc(function) or "")
        entries = {
            name: " ".join(value.split())
            for part in text[1:]
            for name, value in _ENTRY.findall(part)
        }
        found = inspect.signature(function).parameters.values()
        order = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD]
        # The sort is stable: arguments, the shared options of recipes, then the options of this
        # command.
        for each in sorted(found, key=lambda one: one.kind not in order):
            if each.name == "reporter":
                continue
            annotation = each.annotation
            if isinstance(annotation, str):
                # Only of options: other types are imported for type checks alone.
                names = inspect.unwrap(function).__globals__
                annotation = eval(annotation, names)  # noqa: S307 - our own source
            if each.kind is each.VAR_KEYWORD:
                self._add_keywords(annotation)
                continue
            is_option = each.kind is each.KEYWORD_ONLY
            self._add(each.name, annotation, each.default, is_option, entries.get(each.name))

    def keywords(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords for the function, without options that the user omitted."""
        found = {
            name: self._convert[name](value)
            for name, value in options.items()
            if value is not None and name in self._convert
        }
        for option, name in self._empty.items():
            if keys := options[option]:
                found[name] = {**found.get(name, {}), **dict.fromkeys(keys, "")}
        if self._settings:
            from luthier.recipe import parse_setting

            found |= dict(parse_setting(text) for text in options["set_"] or ())
        return found

    def _add_keywords(self, annotation: Any) -> None:
        (keywords,) = (each for each in get_args(annotation) if isinstance(each, KeywordOptions))
        for name, kind in keywords.options.items():
            self._add(name, kind, keywords.defaults.get(name), True, None)
        if keywords.settings:
            option = typer.Option("--set", metavar="KEY=VALUE", help=keywords.settings)
            self.shown.append(_keyword("set_", Annotated[list[str] | None, option], None))
            self._settings = True

    def _add(
        self, name: str, annotation: Any, default: Any, is_option: bool, text: str | None
    ) -> None:
        info: Any = typer.Option() if is_option else typer.Argument()
        kind = annotation
        converted = None
        if get_origin(annotation) is Annotated:
            kind, *metadata = get_args(annotation)
            for each in metadata:
                if isinstance(each, OptionInfo | ArgumentInfo):
                    # A copy: one annotation is shared by several commands, and each has a help text
                    # of its own.
                    info = copy.copy(each)
                elif isinstance(each, FromText):
                    converted = each
        self._convert[name] = converted.convert if converted else lambda value: value
        kind = _text_type(converted.type if converted else kind)
        info.help = text or info.help
        # Without a declaration, typer adds a second option `--no-NAME`.
        if kind is bool and not info.param_decls:
            info.param_decls = (f"--{name.replace('_', '-')}",)
        if default == () or isinstance(default, Mapping):
            default = None
        if default is None:
            kind = kind | None
        self.shown.append(_keyword(name, Annotated[kind, info], default))
        if converted and converted.empty:
            option = typer.Option(metavar="COLUMN", help=converted.empty_help)
            self.shown.append(_keyword(converted.empty, Annotated[list[str] | None, option], None))
            self._empty[converted.empty] = name


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _text_type(kind: Any) -> Any:
    """Return the command-line type of a parameter: text wherever a function accepts text."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        given = [each for each in parts if each is not type(None)]
        return str if str in given else _text_type(given[0])
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return list[_text_type(parts[0])]  # type: ignore[misc]
    return kind


_RANGE_OR_LIST = re.compile(r"^<(?:list\[(.*)\]|(.*) range)>$")
"""Typer's display of a bounded number or a repeatable option."""


MORE = "More commands"
"""Heading of commands without a line of help."""
MOVED = {
    "certificate": "models certificate", "learning-curve": "study --preset rows",
    "mine-negatives": "convert --mine-negatives",
    "push": "models push", "reconstruct": "sample --reconstruct", "search": "study --search 12",
    "samples": "models samples",
    "student": "models student", "verify": "models verify",
}  # fmt: skip
"""Commands by their former name."""


class _Group(TyperGroup):
    """Group with suggestions from all groups for an unknown name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, everywhere = args[0], ctx.find_root().command
        if self.get_command(ctx, name) is None:
            known = name if everywhere.get_command(ctx, name) is not None else MOVED.get(name)
            if known is not None:
                ctx.fail(f"No such command {name!r}. Did you mean `luthier {known}`?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by panel, with the first sentence of each.

        Click's own method cuts the sentence at the width that is left of 80 columns.
        """
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                panel = command.rich_help_panel
                rows = panels.setdefault(panel if isinstance(panel, str) else "Commands", [])
                rows.append((name, command.get_short_help_str(NO_WRAP)))
        for panel, rows in panels.items():
            with formatter.section(panel):
                if panel == MORE:
                    formatter.write_text(", ".join(name for name, _ in rows))
                else:
                    formatter.write_dl(rows)


class _Command(TyperCommand):
    """Command that shows an option's plain type: the help text has the range."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parameters: list[Any] = list(self.params)
        for each in parameters:
            if hasattr(each, "display_type"):  # older versions of typer leave the type to click
                text = _RANGE_OR_LIST.sub(r"<\1\2>", each.display_type(ctx))
                shown = text.replace("Path", "path")
                each.display_type = lambda ctx, shown=shown: shown
        super().format_options(ctx, formatter)


class CommandGroup(typer.Typer):
    """Group of commands that report errors as a message, or as an object with ``--json``."""

    def __init__(self, help: str, extra: str = "", **settings: Any) -> None:
        """Create a group; ``extra`` is the required extra of the package."""
        # Commands below have the width of the first; click's own is 80 columns at most.
        width = {"max_content_width": NO_WRAP}
        super().__init__(
            help=help, no_args_is_help=True, cls=_Group, context_settings=width, **settings
        )
        self.extra = extra

    def add(self, command: Command, panel: str | None = None) -> None:
        """Register a command under a heading of the group's help."""
        run = command.typer_function(self.extra)
        super().command(command.name, cls=_Command, rich_help_panel=panel)(run)


def plain(result: Any) -> Any:
    """Return a result as values for JSON."""
    if hasattr(result, "plain"):
        return result.plain()
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(result)
