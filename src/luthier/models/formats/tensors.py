"""Reading and writing safetensors files; torch is imported at the first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import CorruptFile, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

READ_WHOLE = 64 << 20
"""Maximum size of files that are read instead of memory-mapped, such as adapters, in bytes."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous ``tensors`` to the new file ``path``."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CorruptFile: if the file cannot be read or is not a safetensors file.
    """
    from safetensors.torch import load, load_file

    with _reading(path):
        # safetensors 0.8 leaks two integers per tensor of a mapped file, and mapping is slower.
        if path.stat().st_size <= READ_WHOLE:
            try:
                return dict(load(path.read_bytes()))
            except KeyError:  # a type that safetensors supports in mapped files only, such as F4
                pass
        return dict(load_file(path))


def cast_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point tensors that ``model`` stores.

    Other buffers, such as rotary frequencies, keep their precision.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def tensor_headers(path: Path) -> dict[str, tuple[str, Sequence[int]]]:
    """Return the type, such as ``BF16``, and shape of each tensor from the file's header.

    Raises:
        CorruptFile: see :func:`load_tensors`.
    """
    from safetensors import safe_open

    # framework "pt" would import torch
    with _reading(path), safe_open(path, framework="np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise CorruptFile with ``path`` for the errors of the system and of safetensors."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptFile(f"Cannot read {path}: {error}", rule="file.unreadable") from error
