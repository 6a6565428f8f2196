"""Import from OpenAI: ``import_openai``.

An import converts files, without a model and without a network. Everything that cannot be imported
is listed with a reason, in the result and in ``IMPORT.md`` of the new folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.migrate.files import Import


def import_openai(
    export: str | Path, folder: str | Path = "imported", *, judge: str | None = None
) -> Import:
    """Write rows, recipes and graders of an OpenAI account.

    The export has the objects of the API as ``.json`` or ``.jsonl``, and the contents of files by
    id or name.

    Args:
        export: Folder with the exported objects.
        folder: New folder for the result.
        judge: Judge for graders: model id, or https://host/v1#model.

    Returns:
        The files with commands for each, and the parts without an equivalent.

    Raises:
        RecipeError: for a folder without OpenAI objects, and for a target folder with files.
    """
    from luthier.migrate.openai import convert

    with _new_import(Path(export), Path(folder)) as result:
        convert(Path(export), result, judge)
    return result


@contextmanager
def _new_import(source: Path, folder: Path) -> Iterator[Import]:
    from luthier.files import check_creatable, new_folder
    from luthier.migrate.files import Import

    check_creatable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is not empty. Choose a new folder")
    with new_folder(folder) as target:
        result = Import(source, folder, target)
        yield result
        result.write_report()
