"""Setting how much a network drops in training (Srivastava et al. 2014, JMLR 15).

transformers builds ``nn.Dropout`` modules from fields of the configuration that each family names
otherwise (``hidden_dropout_prob``, ``resid_pdrop``, ``embd_pdrop``, ``classifier_dropout``, ...). A run
changes the modules and leaves the configuration, which is stored with the model, as it was. Attention
weights are not dropped on the flat layout, so their modules are left alone and not counted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.networks.network import Network


def check_dropout(model: Any) -> None:
    """Reject a network without dropout layers. Works on the meta device.

    Raises:
        RecipeError: with an alternative.
    """
    from torch import nn

    if not any(isinstance(module, nn.Dropout) for module in model.modules()):
        raise _nowhere(model)


def set_dropout(network: Network, share: float) -> list[str]:
    """Drop ``share`` of the hidden states in training wherever ``network`` has a dropout for them.

    Which they are is found by a few tokens sent through the network. To be called before an adaptation
    adds its own.

    Returns:
        The places, by name, ``*`` for the number of the layer.

    Raises:
        RecipeError: where there is no such place.
    """
    import torch
    from torch import nn

    from luthier.models.networks.probe import Probe

    called: list[nn.Module] = []
    dropouts = {n: m for n, m in network.model.named_modules() if isinstance(m, nn.Dropout)}
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in dropouts.values()
    ]
    network.model.eval()
    try:
        with torch.no_grad():
            Probe(network.model, network.device).ours(network)
    finally:
        for hook in hooks:
            hook.remove()
    places: dict[str, None] = {}
    for name, module in dropouts.items():
        if any(module is other for other in called):
            module.p = share
            places[re.sub(r"\.\d+(?=\.|$)", ".*", name)] = None
    if not places:
        raise _nowhere(network.model)
    return list(places)


def _nowhere(model: Any) -> RecipeError:
    return RecipeError(
        f"Networks of type {model.config.model_type} have attention dropout only, which luthier "
        "disables. Remove `training.dropout`, or use `adaptation.dropout` with LoRA.",
        rule="dropout.none",
    )
