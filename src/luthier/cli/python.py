"""Commands as Python functions: rows in memory, progress, and signatures without the command line.

:func:`public` adapts a function for users of ``import luthier``; the command line calls the
function itself. The first parameter of a function, and each parameter of :data:`_SOURCES`, accepts
rows in memory.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ForwardRef, get_args, get_origin

from luthier.cli.terminal.bridge import KeywordOptions
from luthier.errors import LuthierError, RecipeError
from luthier.formatting import map_code, python_keyword
from luthier.models.process_group import ProcessGroup

_SOURCES = ("data", "source", "prompts", "input", "validation", "test", "train", "corpus")
"""Parameters for rows."""
_NAMED = ("train", "validation", "test", "corpus")
"""Sources whose rows have the name of the parameter in findings, unless it is the first source."""
_SOURCE_TYPE = "str | Path | Rows"
_FILES = "Sequence[str | Path]"
_PATHS = (Path | str, Path | str | None)
_FIELDS = inspect.Parameter.VAR_KEYWORD
_HELD_OUT = ("evaluate", "compare", "predict", "judge")
"""Functions that prefer the test rows of a data set with splits."""


def public(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` for Python programs."""
    own = inspect.signature(function)
    signature = _public_signature(function, own)
    settings = next((each.name for each in own.parameters.values() if each.kind is _FIELDS), "")
    paths = [each.name for each in signature.parameters.values() if each.annotation in _PATHS]
    lists = [
        name for name in own.parameters
        if "Sequence[" in str(signature.parameters.get(name, "")) and name not in _SOURCES
    ]  # fmt: skip

    @wraps(function)
    def call(*positional: Any, **keywords: Any) -> Any:
        given = own.bind(*positional, **keywords).arguments
        given |= given.pop(settings, {})
        given |= {name: Path(given[name]) for name in paths if isinstance(given.get(name), str)}
        # A text is a sequence of its characters.
        given |= {name: [given[name]] for name in lists if isinstance(given.get(name), str | Path)}
        with python_settings():
            _store_sources(function.__name__, given, own.parameters, settings)
            if "reporter" not in own.parameters or given.get("reporter") is not None:
                return function(**given)
            with _reporter(bool(given.get("resume"))) as reporter:
                return function(**{**given, "reporter": reporter})

    call.__signature__ = signature  # type: ignore[attr-defined]
    # Pickle finds a function by module and name.
    call.__module__ = "luthier"
    call.__qualname__ = function.__name__
    return call


@contextmanager
def python_settings() -> Iterator[None]:
    """Name settings as Python keywords in the message of an error."""
    try:
        yield
    except LuthierError as error:
        error.args = (map_code(str(error), python_keyword),)
        raise


def _store_sources(
    name: str, given: dict[str, Any], parameters: Mapping[str, inspect.Parameter], settings: str
) -> None:
    """Replace rows in memory by their files, in place."""
    texts = given.get("text")
    if name == "predict" and not isinstance(texts, str | None):
        given["input"] = given.pop("text")
    sources = [each for each in _SOURCES if each in given]
    if not any(not isinstance(given[each], str) for each in sources):
        return
    from luthier.data.in_memory import ROWS_FIX, is_rows, is_splits, store_rows, values_of

    for source in sources:
        if is_splits(given[source]):
            given |= _splits(name, source, given, parameters, settings)
    for source in [each for each in _SOURCES if each in given]:
        rows = given[source]
        if source == "input" and (hasattr(rows, "tolist") or hasattr(rows, "to_list")):
            rows = values_of(rows)
        # A list of `input` has texts, other lists have names of files.
        if is_rows(rows) or (source == "input" and isinstance(rows, list | tuple)):
            named = source in _NAMED and source != sources[0]
            key = "prompt" if source == "prompts" else "text"
            path = store_rows(rows, key, source if named else "rows")
            given[source] = path if source in parameters and source != "input" else str(path)
        elif isinstance(rows, list | tuple | Mapping):
            if "Sequence" in str(parameters.get(source)):  # several files
                continue
            message = f"`{source}` is a {type(rows).__name__} of texts."
            raise RecipeError(message, setting=source, advice=f"{ROWS_FIX} Or name a file.")


def _splits(
    name: str, source: str, given: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter], settings: str,
) -> dict[str, Any]:  # fmt: skip
    """Return parameters for the splits of ``source``, without parameters that the user gave."""
    from luthier.data.files.sources import split_of

    found: dict[str, Any] = {}
    for key, rows in given[source].items():
        if (split := split_of(str(key))) in found:
            names = [str(each) for each in given[source] if split_of(str(each)) == split]
            raise RecipeError(
                f"`{source}` has several splits for {split} rows: {', '.join(names)}. Keep one of "
                "the splits",
                setting=source,
            )
        found[split] = rows
    order = (
        ("test", "validation", "train") if name in _HELD_OUT else ("train", "validation", "test")
    )
    main = next(each for each in order if each in found)
    accepted = {
        each
        for each in found
        if each != main
        and each not in given
        and ((each == "validation" and settings) or each in parameters)
        and (each not in parameters or parameters[each].default is None)
    }
    return {source: found[main], **{each: found[each] for each in accepted}}


def _reporter(resume: bool) -> AbstractContextManager[Any]:
    """Return a display of progress if a person watches, else ``None`` in a context."""
    from luthier.cli.terminal.progress import can_draw

    shell = sys.modules.get("IPython")
    in_notebook = shell is not None and shell.get_ipython() is not None and not sys.stdout.isatty()
    if not (can_draw() or in_notebook) or ProcessGroup.of_environment().rank:
        return nullcontext()
    from luthier.cli.terminal.progress import NotebookReporter, ProgramReporter

    return NotebookReporter(resume) if in_notebook else ProgramReporter(resume)


def _public_signature(function: Callable[..., Any], own: inspect.Signature) -> inspect.Signature:
    names = inspect.unwrap(function).__globals__
    parameters = list[inspect.Parameter]()
    for each in own.parameters.values():
        kind, keywords = _plain_type(each.annotation, names)
        if each.kind is _FIELDS and keywords is not None:
            parameters += _fields(keywords, own.parameters)
            kind = Any
        elif each.name in _SOURCES and not (each.name in ("validation", "test") and each.default):
            rest = [one for one in str(kind).split(" | ") if one not in ("str", "Path")]
            text = [_SOURCE_TYPE] + [one for one in ("Recipe",) if one in rest]
            text += [_FILES] * ("Sequence[" in str(kind))
            kind = " | ".join(text + (["None"] if each.default is None else []))
        elif kind in (Path, Path | None):
            kind = kind | str
        parameters.append(each.replace(annotation=kind))
    if function.__name__ == "predict":
        parameters[1] = parameters[1].replace(annotation="str | Sequence[str] | Rows | None")
    returned, _ = _plain_type(own.return_annotation, names)
    return own.replace(parameters=parameters, return_annotation=returned)


def _fields(
    keywords: KeywordOptions, known: Mapping[str, inspect.Parameter]
) -> list[inspect.Parameter]:
    """Return a keyword for each field of a recipe with a short name."""
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=_FIELD_TYPES.get(name) or _plain_type(kind, {})[0] | None,
        )
        for name, kind in keywords.options.items()
        if name not in known
    ]  # fmt: skip


_FIELD_TYPES = {
    "validation": f"{_SOURCE_TYPE} | None",
    "columns": "Mapping[str, str] | None",
    "mix": "Sequence[Mapping[str, Any]] | None",
    "chat_template": "str | Path | None",
    "teacher": "str | Mapping[str, Any] | None",
    "objective": "str | Mapping[str, Any] | None",
    "adaptation": "str | Mapping[str, Any] | None",
}
"""Types of fields that differ from the type of the option."""


def _plain_type(annotation: Any, names: Mapping[str, Any]) -> tuple[Any, KeywordOptions | None]:
    """Return an annotation without the parts for the command line, and the options of keywords."""
    kind = annotation
    if isinstance(kind, str):
        try:
            kind = eval(kind, dict(names))  # noqa: S307 - our own source
        except NameError:  # imported for type checks alone
            return annotation, None
    keywords = None
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        keywords = next((each for each in metadata if isinstance(each, KeywordOptions)), None)
    if isinstance(kind, ForwardRef):
        return kind.__forward_arg__, keywords
    if any(get_origin(part) is Annotated for part in get_args(kind)):  # Annotated[…] | None
        parts = (_plain_type(part, names)[0] for part in get_args(kind))
        return " | ".join(part if isinstance(part, str) else _name(part) for part in parts), None
    return kind, keywords


def _name(kind: Any) -> str:
    return "None" if kind is type(None) else inspect.formatannotation(kind)
