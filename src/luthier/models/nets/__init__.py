"""Networks that transformers does not have, as its own kind of classes.

Each is a module of its own whose ``CLASSES`` says which automatic class of transformers finds which
of its models. Once registered, a folder of one loads like any other: no code comes from the folder.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

NETS = {
    "palm": "luthier.models.nets.palm",
    "line_encoder": "luthier.media.networks.line_encoder",
    "efficientnet_lite": "luthier.media.networks.efficientnet_lite",
    "elmo": "luthier.models.nets.elmo",
    "fasttext": "luthier.models.nets.fasttext",
    "small_cnn": "luthier.media.networks.small_cnn",
    "dcgan": "luthier.media.networks.dcgan",
    "unet": "luthier.media.networks.unet",
    "vae": "luthier.media.networks.vae",
    "vgg": "luthier.media.networks.vgg",
    "stable_diffusion": "luthier.media.networks.stable_diffusion",
    "transfo_xl": "luthier.models.nets.transfo_xl",
    "mean_pooling_bert": "luthier.models.nets.mean_pooling_bert",
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
