"""safetensors files of the store: encrypted where it is.

An encrypted file is made and opened in memory, so that once, for a moment, its tensors are there twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.encryption.chunks import SealedReader
from luthier.encryption.files import is_sealed, new_data_file, read_data
from luthier.encryption.keys import keyring, keys_for
from luthier.errors import CorruptFile

if TYPE_CHECKING:
    from torch import Tensor

READ_WHOLE = 64 << 20
"""Bytes of a file that is read and not mapped, such as an adapter's: it is loaded again and again."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors``, which are contiguous, to the new file ``path``."""
    from safetensors.torch import save, save_file

    known = dict(metadata) if metadata else None
    if keys_for(path) is None:
        save_file(dict(tensors), path, metadata=known)
        return
    content = save(dict(tensors), metadata=known)
    with new_data_file(path) as file:
        file.write(content)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What :func:`save_tensors` wrote.

    Raises:
        CorruptFile: for a file that cannot be read, or is none of safetensors.
    """
    from safetensors.torch import load, load_file

    with _reading(path):
        # safetensors 0.8 leaks two integers with each tensor of a mapped file, which takes longer, too.
        sealed = is_sealed(path)
        if sealed or path.stat().st_size <= READ_WHOLE:
            try:
                return dict(load(read_data(path)))
            except KeyError:  # a type that it only knows in mapped files, such as F4
                if sealed:
                    raise
        return dict(load_file(path))


def tensor_headers(path: Path) -> dict[str, tuple[str, Sequence[int]]]:
    """Type, such as ``BF16``, and shape of each tensor of a file; only its header is read.

    Raises:
        CorruptFile: as :func:`load_tensors`.
    """
    from safetensors import safe_open

    with _reading(path):
        ring = keyring() if is_sealed(path) else None
        if ring is None:
            with safe_open(path, framework="np") as file:  # torch would be imported for "pt"
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    with SealedReader(path, ring) as reader:
        size = int.from_bytes(b"".join(reader.pieces(0, 8)), "little")
        header = json.loads(b"".join(reader.pieces(8, size)))
    header.pop("__metadata__", None)
    return {name: (each["dtype"], each["shape"]) for name, each in header.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of what the system or safetensors raises in the block that ``path`` cannot be read."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
