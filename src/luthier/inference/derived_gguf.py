"""GGUF files of stored models, for backends that run files.

    cache/gguf/<id>~<hash of the model>~<type>/
        model.gguf, and parity.json: comparison with torch

A file is written once, from the network with all adapters merged. The folder name contains the hash
of all inputs of the model, so that no changed model uses an old file. A new file is compared with
torch (:func:`luthier.evaluation.parity.compare_backends`). A file with different results is
deleted, and the record has the reason. The file has only the network: tokenization and decoding are
the same as with torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from luthier.errors import CorruptFile, RecipeError
from luthier.evaluation.parity import REFERENCE_PROMPTS, compare_backends
from luthier.files import lock, need_disk, new_folder, read_json, sha256_of, write_json
from luthier.inference.gguf_parity import TOKENS, largest_divergence
from luthier.library.folders import gguf_folder
from luthier.library.models import StoredModel, check_mergeable
from luthier.models.decoding.backends import LLAMA_CPP_VERSION, OpenFile
from luthier.models.manifest import Record, TokenParity
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.models.formats.gguf import Quantization

TYPE_SETTING = "LUTHIER_GGUF_TYPE"
"""Environment variable of the weight type."""
DEFAULT_TYPE = "f16"
"""Default weight type: the tokens of SmolLM2 are 3e-6 nats from torch's (q8_0: 4e-3)."""
FILE, RECORD = "model.gguf", "parity.json"


class DerivedFile(Record):
    """Record of a derived file."""

    model: str
    type: str
    """Weight type."""
    sha256: str
    llama_cpp: str
    """Version of llama.cpp in the comparison."""
    parity: TokenParity
    refusal: str
    """Reason to reject the file; empty for an accepted file."""


def gguf_type() -> Quantization:
    """Return the weight type of new files.

    Raises:
        RecipeError: for an unknown type in the environment variable.
    """
    from luthier.models.formats.gguf import check_quantization

    try:
        return check_quantization(os.environ.get(TYPE_SETTING) or DEFAULT_TYPE)
    except RecipeError as error:
        raise RecipeError(f"{TYPE_SETTING}: {error}") from error


def check_derivable(stored: StoredModel) -> None:
    """Raise :class:`RecipeError` for a model without a GGUF equivalent."""
    from luthier.models.formats.gguf_networks import network_of

    network_of(str(stored.network.fields.get("model_type")), stored.id)
    check_mergeable(stored, "a GGUF file holds nothing else")


def has_gguf(stored: StoredModel, kind: Quantization) -> bool:
    """Return True if an accepted file of ``stored`` is in the cache. Reads no weights."""
    return (gguf_folder(stored.id, stored.content_hash, kind) / FILE).exists()


def gguf_of(stored: StoredModel, kind: Quantization, open_file: OpenFile) -> Path:
    """Return the file of ``stored``; write and compare the file if missing.

    Raises:
        RecipeError: for a model without a GGUF equivalent, or a file with different results.
    """
    check_derivable(stored)
    folder = gguf_folder(stored.id, stored.content_hash, kind)
    # Next to the folder, because `new_folder` replaces the folder itself.
    with lock(folder.parent / f".{folder.name}.lock", wait=True):
        record = _read(folder)
        if record is None:
            record = _derive(stored, kind, folder, open_file)
    if record.refusal:
        raise RecipeError(record.refusal)
    return folder / FILE


def _read(folder: Path) -> DerivedFile | None:
    """Return the record of an intact file that was compared in this version of llama.cpp."""
    try:
        record = DerivedFile.model_validate(read_json(folder / RECORD))
        # A rejected file is deleted, so only its record is checked.
        is_intact = record.refusal or sha256_of(folder / FILE) == record.sha256
        # Another version may compute other numbers, so the file is compared again.
        return record if is_intact and record.llama_cpp == LLAMA_CPP_VERSION else None
    except (CorruptFile, OSError, ValidationError):
        return None


def _derive(
    stored: StoredModel, kind: Quantization, folder: Path, open_file: OpenFile
) -> DerivedFile:
    from luthier.engine.machine import open_network
    from luthier.models.decoding.torch_backend import torch_backend
    from luthier.models.formats.gguf import GeneralMetadata, file_size, write_gguf

    network = open_network(stored)
    try:
        need_disk(folder, file_size(network.model, kind), f"the GGUF file of {stored.id}")
        with new_folder(folder) as fresh:
            context, vocabulary = stored.room, int(network.model.config.vocab_size)
            about = GeneralMetadata(stored.id)
            write_gguf(network.model, None, fresh / FILE, kind, about, context)
            # Half of the context stays free for the reply.
            chat, longest = stored.chat, context // 2
            prompts = [
                chat.encode_prompt([Message("user", text)])[:longest] for text in REFERENCE_PROMPTS
            ]
            reference = torch_backend(network, context)
            try:
                other = open_file(fresh / FILE, context, vocabulary)
                try:
                    parity = compare_backends(reference, other, prompts, min(TOKENS, context // 2))
                finally:
                    other.close()
            finally:
                reference.close()
            record = DerivedFile(
                model=stored.id,
                type=kind,
                sha256=sha256_of(fresh / FILE),
                llama_cpp=LLAMA_CPP_VERSION,
                parity=parity,
                refusal=_refusal(parity, kind),
            )
            write_json(fresh / RECORD, record.model_dump())
            if record.refusal:
                # The record stays, so that later loads do not write and compare the file again.
                (fresh / FILE).unlink()
    finally:
        network.close()
    return record


def _refusal(parity: TokenParity, kind: Quantization) -> str:
    limit = largest_divergence(kind)
    if parity.mean_kl <= limit:
        return ""
    return (
        f"the GGUF file ({kind}) differs from the model: {parity.describe()}, limit "
        f"{limit:g}{parity.difference_text()}"
    )
