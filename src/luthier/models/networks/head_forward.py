"""Forward passes of transformers' heads on hidden states that are already computed.

Each class of transformers (``BertForSequenceClassification``, ``ModernBertForMaskedLM``) selects,
pools and transforms the states of its backbone in its own ``forward``. luthier runs this code
unchanged on a shallow copy of the model, in which another module stands in for the backbone. So a
new family needs no code for its head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.networks.modalities import run_media


class _Output:
    """Output of a backbone, with the attributes and the order of transformers' classes."""

    def __init__(self, backbone: Any, states_RTH: Tensor) -> None:
        self.backbone, self.last_hidden_state = backbone, states_RTH

    @property
    def pooler_output(self) -> Tensor:
        """Output of the pooler, ``[R, H]``, for heads that use the output."""
        backbone, states_RTH = self.backbone, self.last_hidden_state
        pooled_RH: Tensor
        if isinstance(backbone.pooler, nn.Linear):  # ALBERT
            pooled_RH = backbone.pooler_activation(backbone.pooler(states_RTH[:, 0]))
        else:
            pooled_RH = backbone.pooler(states_RTH)
        return pooled_RH

    def __getitem__(self, index: int) -> Tensor:
        return self.pooler_output if index else self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        """Return None: layer states, attention weights and caches are not computed."""


class _GivenStates(nn.Module):
    """A stand-in for ``backbone`` that returns ``states_RTH``."""

    def __init__(self, backbone: nn.Module, states_RTH: Tensor) -> None:
        super().__init__()
        self._output = _Output(backbone, states_RTH)

    def forward(self, *_: Any, **__: Any) -> _Output:
        return self._output


def head_logits(model: Any, states_RTH: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of ``model`` for the states ``[R, T, H]`` of the backbone.

    Args:
        inputs: Other arguments of the forward pass, such as ``attention_mask``.
    """
    backbone = _GivenStates(model.base_model, states_RTH)
    # Not a call: hooks of the model belong to a whole forward pass.
    return logits_of(_replace(model, model.base_model_prefix, backbone).forward(**inputs))


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network's ``output``; of answers to questions, ``[R, T, 2]``."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    logits: Tensor = output.logits
    return logits


def before_output_layer(model: Any, states_SH: Tensor) -> Tensor:
    """Return the input ``[S, D]`` of the output embedding, behind the other layers of the head."""
    layer = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is layer)
    return head_logits(_replace(model, name, nn.Identity()), states_SH[None])[0]


MEDIA_HEAD = ("projector", "dropout", "classifier")
"""Modules above the states of images and audio, in the order of the forward pass."""


def classifier_input(model: Any, arrays: Tensor) -> Tensor:
    """Return the input ``[R, H]`` of the classifier for images or audio ``[R, C, H, W]``.

    DINOv2 classifies the first token with the mean of the patches, Wav2Vec2 the mean of all states.
    The projector of Wav2Vec2 is linear, so projecting the mean equals the mean of projections.
    """
    for name in MEDIA_HEAD:
        if hasattr(model, name):
            model = _replace(model, name, nn.Identity())
    states: Tensor = run_media(model, arrays).logits
    return states.flatten(1)


def media_scores(model: Any, states_RH: Tensor) -> Tensor:
    """Return class scores ``[R, C]`` of images or audio for the result of `classifier_input`."""
    for name in MEDIA_HEAD:
        states_RH = getattr(model, name, nn.Identity())(states_RH)
    return states_RH


def _replace(module: Any, name: str, new: nn.Module) -> Any:
    """Return a shallow copy of ``module`` with ``new`` as the submodule ``name``."""
    child, _, inner = name.partition(".")
    view = copy.copy(module)
    own = module._modules
    view._modules = {**own, child: _replace(own[child], inner, new) if inner else new}
    return view
