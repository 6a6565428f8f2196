"""What a folder in the form of Hugging Face describes, before anything of it is loaded.

The network is drawn once with PyTorch and transformers, whose import takes seconds. The store keeps the
result, for commands that need only the network's task and size.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.data.media import MOST_PIXELS
from luthier.errors import LuthierError, ModelRefused, UnknownModel
from luthier.files import luthier_home, read_json, write_bytes
from luthier.media.processors import read_processor
from luthier.models.base_kinds import kind_of_network
from luthier.models.config_errors import refuse_configuration
from luthier.models.external import (
    CONFIG,
    check_layers,
    check_sizes,
    check_weights,
    read_network_fields,
    weight_files,
)
from luthier.models.heads import Head, Task, task_in
from luthier.models.modalities import input_shape, media_config
from luthier.models.pipelines import is_pipeline, network_folders, read_pipeline


def check_folder(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; refuses folders without one or without safetensors.

    Of a pipeline of diffusers the same of its parts.

    Raises:
        UnknownModel, ModelRefused: also for a configuration that describes no network, or another than
            the one whose weights lie in the folder. Nothing was built then.
    """
    fields = read_model_fields(folder)
    try:
        described_network(folder)
    except ModelRefused as refused:  # whose file is named as seen from the folder
        why = refused.problem
        place = str(folder / why.file)
        raise ModelRefused(place, why.rule, why.message, why.advice) from refused
    return fields


def read_model_fields(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``, or one made of those of a pipeline; its networks are not looked at.

    Raises:
        UnknownModel: for a folder of no model that is known.
        CorruptFile: for a file that cannot be read.
    """
    return read_pipeline(folder) if is_pipeline(folder) else read_network_fields(folder)


@dataclass(frozen=True)
class DescribedNetwork:
    """What a configuration describes, drawn without numbers."""

    task: Task
    """What the head of the class that it names is for."""
    numbers: int
    """Numbers of its weights; of an encoder of texts or a classifier without the head."""
    flat: bool
    """Whether many of its sequences can be written side by side (:mod:`luthier.models.layouts`)."""
    heads: tuple[str, ...]
    """Names of the modules above the backbone."""


def described_network(folder: Path) -> DescribedNetwork:
    """Describe the network of ``config.json`` in ``folder``, drawn once as long as no file changes.

    Raises:
        UnknownModel: for a configuration that describes no network.
        ModelRefused: for a network that is larger than its stored weights.
    """
    files = [
        path for part in network_folders(folder) for path in (part / CONFIG, *weight_files(part))
    ]
    try:
        versions = tuple((each.name, (s := each.stat()).st_mtime_ns, s.st_size) for each in files)
    except FileNotFoundError:
        read_model_fields(folder)  # says which file is missing
        raise
    return _described(folder, versions, luthier_home())


def described_kind(folder: Path) -> str | None:
    """The kind of base model that the network in ``folder`` is.

    ``None`` for one that is none, such as a classifier of texts, whose classes are another's.

    Raises:
        UnknownModel, ModelRefused: as :func:`described_network` does.
    """
    if (own := kind_of_network(folder)) is not None:
        return own
    task, processor = described_network(folder).task, read_processor(folder)
    if task == "causal_lm":
        return task
    if processor is not None and processor.kind in ("image", "audio"):
        return f"{processor.kind}_encoder"
    return "encoder" if processor is None and task in ("masked_lm", "embedding") else None


_HEADS_LEFT_OUT: tuple[Task, ...] = (
    "masked_lm", "bidirectional_lm", "sequence_classification", "token_classification"
)  # fmt: skip
"""Heads that depend on what is learned, or that few folders of the family hold."""


@lru_cache(maxsize=64)
def _described(folder: Path, versions: Any, home: Path) -> DescribedNetwork:
    """Return the stored description of a network, or draw the network and store it."""
    fields = read_model_fields(folder)
    libraries = [__version__, *map(version, ("torch", "transformers"))]
    known = json.dumps([str(folder.absolute()), versions, fields, libraries])
    record = home / "cache" / "networks" / f"{hashlib.sha256(known.encode()).hexdigest()}.json"
    with suppress(OSError, LuthierError, TypeError, KeyError):  # not stored, or damaged
        stored = read_json(record)
        return DescribedNetwork(**stored | {"heads": tuple(stored["heads"])})
    described = _draw_described(folder, fields)
    with suppress(OSError, LuthierError):  # a store that is full or read-only
        write_bytes(record, json.dumps(asdict(described)).encode())
    return described


def _draw_described(folder: Path, fields: dict[str, Any]) -> DescribedNetwork:
    check_layers(fields)
    from luthier.models.layouts import is_flat
    from luthier.models.load import configuration, draw, for_head

    import_transformers()
    if is_pipeline(folder):
        from luthier.media.networks.stable_diffusion import part_classes

        part_classes()
    kind = fields.get("model_type", "of unknown type")
    with refuse_configuration(UnknownModel, f"the network in {folder} ({kind}) cannot be loaded"):
        config = configuration(folder, fields)
        task = task_in(config)
        bare: Task = "embedding" if task in _HEADS_LEFT_OUT else task
        network = draw(for_head(config, Head(bare)), Head(bare))
        shape = input_shape(config) if media_config(config) is not None else (1,)
        if min(shape) < 1 or prod(shape) > MOST_PIXELS:
            raise ValueError(f"what it reads has the shape {shape}")
        if empty := [name for name, weight in network.named_parameters() if not weight.numel()]:
            raise ValueError(f"{empty[0]} has no numbers")
    numbers = sum(weight.numel() for weight in network.parameters())
    if not fields.get("quantization_config"):  # its files hold several numbers in one
        check_sizes(numbers, sum(map(check_weights, network_folders(folder))))
    flat = is_flat(network)
    above = [name for name, child in network.named_children() if child is not network.base_model]
    return DescribedNetwork(task, numbers, flat, tuple(above))


_IMPORTING = threading.Lock()
_NETWORKS = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")


def import_transformers(networks: bool = True) -> None:
    """Have what networks of any family import of transformers, which is not to count as their own.

    Its names are found as they are first asked for, and threads that ask at once get some too early.
    Without ``networks``, what reads texts alone, for which torch need not be there.
    """
    with _IMPORTING:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        for name in _NETWORKS if networks else ():
            import_module(name)
