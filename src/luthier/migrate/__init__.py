"""What other tools keep, as files of luthier's: ``import_promptfoo`` and ``import_openai``.

An import reads and converts; it asks no model and needs no network. What cannot be carried over is
listed with its reason, in what it returns and in ``IMPORT.md`` of the new folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import RecipeError
from luthier.migrate.files import Import


def import_promptfoo(config: str | Path, folder: str | Path, *, judge: str | None = None) -> Import:
    """Write the prompts, tests and assertions of a promptfoo configuration as rows and graders.

    Args:
        config: a ``promptfooconfig.yaml``, or the same as JSON. Files that it names are read where they
            stand in its folder or below.
        folder: a new folder.
        judge: the model that rubrics are asked of, as an id or ``https://host/v1#model``; without one,
            the model of OpenAI's that the tests name.

    Returns:
        The files, with commands to go on, and what could not be carried over.

    Raises:
        RecipeError: for a file that is no configuration or has nothing to import, and a folder that
            holds something.
    """
    from luthier.migrate.promptfoo import convert

    with _new_import(Path(config), Path(folder)) as result:
        convert(Path(config), result, judge)
    return result


def import_openai(export: str | Path, folder: str | Path, *, judge: str | None = None) -> Import:
    """Write files, jobs, evals and answers of an OpenAI account as rows, recipes and graders.

    Args:
        export: a folder with the objects that the API lists or gives, as ``.json`` or ``.jsonl``, and
            the contents of files by their ids or names.
        folder: a new folder.
        judge: the model that graders ask in place of OpenAI's, as an id or ``https://host/v1#model``.

    Returns:
        The files, with commands to go on, and what could not be carried over.

    Raises:
        RecipeError: for a folder without an object of OpenAI's, and a target that holds something.
    """
    from luthier.migrate.openai import convert

    with _new_import(Path(export), Path(folder)) as result:
        convert(Path(export), result, judge)
    return result


@contextmanager
def _new_import(source: Path, folder: Path) -> Iterator[Import]:
    from luthier.files import check_creatable, new_folder

    check_creatable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} holds something already; name a new folder")
    with new_folder(folder) as target:
        result = Import(source, folder, target)
        yield result
        result.write_report()
