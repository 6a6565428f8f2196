"""A custom model that is made of other models' weights, without training: a student, a soup.

Its name must be free, and what is written is read back and compared bit for bit before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from luthier import __version__
from luthier.data.chat import ChatFormat
from luthier.engine.runs import Run
from luthier.errors import LuthierError, RecipeError
from luthier.models.manifest import Manifest, created_now
from luthier.recipe import check_name
from luthier.store.models import StoredModel, text_format


@contextmanager
def claim_name(root: str, name: str) -> Iterator[Run]:
    """Hold the name of a model that goes back to the base ``root`` while it is made.

    Raises:
        RecipeError: for what is no name.
        RunConflict: for a name that is taken, or that another process works on.
    """
    try:
        run = Run(root, check_name(name))
    except ValueError as error:
        raise RecipeError(f"name {name!r}: {error}") from error
    with run.lock():
        try:
            run.check_free()
            yield run
        finally:
            run.drop_if_empty()


def new_manifest(run: Run, source: StoredModel, chat: ChatFormat, **fields: Any) -> Manifest:
    """The record of a model that writes and reads as ``source`` does, with ``fields`` of its own."""
    return Manifest(
        id=run.model_id,
        root=source.root,
        tokenizer_from=source.tokenizer_from,
        licence=source.manifest.licence,
        created=created_now(),
        luthier=__version__,
        torch=torch.__version__,
        format=text_format(chat),
        **fields,
    )


def check_read_back(made: Mapping[str, Tensor], read: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that were ``read`` back and are not, to the bit, those that were ``made``."""
    odd = [name for name in made if name not in read or not torch.equal(made[name], read[name])]
    if odd:
        raise LuthierError(
            f"the saved {what} is not the one that was made ({', '.join(odd[:3])}); nothing was stored"
        )
