"""Tokenizer, template and room of a base model, without what loads them where memory counts."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

from luthier.data.chat import ChatFormat
from luthier.store.models import StoredModel


def format_of(model: StoredModel, apart: bool = False) -> tuple[ChatFormat, int]:
    """How ``model`` reads rows, and the tokens that a row may have.

    With ``apart`` a process of its own loads it: the libraries that do take 300 MB, which would stay as
    long as this process, and a loaded tokenizer needs a sixth of that.

    Raises:
        UnknownModel, RecipeError: for a model that cannot be used.
    """
    if not apart:
        return _load(model)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        packed = pool.submit(_packed, model).result()
    # Only now, as both would be in memory while that process ends.
    found: tuple[ChatFormat, int] = pickle.loads(packed)  # noqa: S301 - what our own child has just made
    return found


def _packed(model: StoredModel) -> bytes:
    return pickle.dumps(_load(model))


def _load(model: StoredModel) -> tuple[ChatFormat, int]:
    from luthier.store import models as store

    return store.chat_format(model), store.room_of(model)
