"""Networks that transformers does not have, as its own kind of classes.

Each is a module of its own whose ``CLASSES`` says which automatic class of transformers finds which
of its models. Once registered, a folder of one loads like any other: no code comes from the folder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.plugins import bundled

NETS = {
    "palm": "luthier.models.nets.palm",
    "elmo": "luthier.models.nets.elmo",
    "fasttext": "luthier.models.nets.fasttext",
    "transfo_xl": "luthier.models.nets.transfo_xl",
    "mean_pooling_bert": "luthier.models.nets.mean_pooling_bert",
    **{name: point.value for name, point in bundled("networks").items()},
}
"""Module of each network by its ``model_type`` in config.json."""
_COMPOSED = {"line_encoder": "vision-encoder-decoder"}
"""Networks that are a part of one of transformers', whose ``config.json`` names them further inside."""


def register(model_type: str | None = None) -> None:
    """Make the networks here known to transformers' automatic classes; safe to call again.

    Only the one of ``model_type`` where it is given, and none where that is transformers' own.
    """
    for name in NETS if model_type is None else nets_of(model_type):
        _register(name, import_module(NETS[name]))


def nets_of(model_type: str) -> list[str]:
    """Networks here that one of this ``model_type`` is, or may have as a part."""
    return [name for name in NETS if model_type in (name, _COMPOSED.get(name))]


def _register(name: str, net: Any) -> None:
    import transformers

    transformers.AutoConfig.register(name, net.Config, exist_ok=True)
    for automatic, model in net.CLASSES.items():
        getattr(transformers, automatic).register(net.Config, model, exist_ok=True)


def convert_weights(file: Path, folder: Path) -> None:
    """Make a model folder of a lone file with the published weights of a known network.

    Raises:
        UnknownModel: for weights of another network.
        CorruptFile: for a file that cannot be read.
    """
    for point in bundled("weight_files").values():
        point.load()(file, folder)
