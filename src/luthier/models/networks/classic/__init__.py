"""Networks that transformers does not have, as subclasses of transformers' classes.

Textbooks and existing checkpoints need these networks: fastText and ELMo as small, fast rivals of a
Transformer, Transformer-XL, PaLM and LSTM for pre-training and comparison, and BERT with mean
pooling for classifiers that start from a sentence encoder.

``CLASSES`` of each module maps transformers' automatic classes to the module's classes. Registered
networks load like any other network, without code in the model folder.
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.plugins import extensions, load_extension

log = logging.getLogger(__name__)

NETS = {
    "palm": "luthier.models.networks.classic.palm",
    "elmo": "luthier.models.networks.classic.elmo",
    "fasttext": "luthier.models.networks.classic.fasttext",
    "tfidf": "luthier.models.networks.classic.tfidf",
    "item_counts": "luthier.models.networks.classic.item_counts",
    "input_statistics": "luthier.models.networks.classic.statistics",
    "lstm": "luthier.models.networks.classic.lstm",
    "transfo_xl": "luthier.models.networks.classic.transfo_xl",
    "mean_pooling_bert": "luthier.models.networks.classic.mean_pooling_bert",
    **{name: point.value for name, point in extensions("networks").items()},
}
"""Modules by ``model_type``."""
_COMPOSED = {"line_encoder": "vision-encoder-decoder"}
"""Networks that are a part of a transformers network, by the ``model_type`` of the whole."""


def register(model_type: str | None = None) -> None:
    """Register luthier's networks in transformers' automatic classes. Idempotent.

    With ``model_type``, register only the network of this type, if luthier has one.
    """
    for name in NETS if model_type is None else nets_of(model_type):
        try:
            net = import_module(NETS[name])
        except Exception as error:  # a third-party package may raise anything on import
            if model_type is not None or NETS[name].startswith("luthier."):
                raise
            log.warning("the network %s is left out: %s: %s", name, type(error).__name__, error)
            continue
        _register(name, net)


def nets_of(model_type: str) -> list[str]:
    """Return luthier's networks that a network with ``model_type`` can contain."""
    return [name for name in NETS if model_type in (name, _COMPOSED.get(name))]


def _register(name: str, net: Any) -> None:
    import transformers

    transformers.AutoConfig.register(name, net.Config, exist_ok=True)
    for automatic, model in net.CLASSES.items():
        getattr(transformers, automatic).register(net.Config, model, exist_ok=True)


def convert_weights(file: Path, folder: Path) -> None:
    """Convert a file with published weights of a known network into a model folder.

    Raises:
        UnknownModel: for weights of another network.
        CorruptFile: for an unreadable file.
    """
    for point in extensions("weight_files").values():
        load_extension(point)(file, folder)
