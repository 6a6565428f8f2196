"""Adapters: small bottlenecks inside a frozen network (Houlsby et al. 2019, arXiv:1902.00751).

A bottleneck ``y + up(act(down(y)))`` follows the last projection of each sublayer. ``houlsby`` adds
a bottleneck after attention and after the feed-forward part of each layer. ``pfeiffer`` (Pfeiffer
et al. 2021, arXiv:2005.00247) adds only the second.

Convolutional networks get series adapters (Rebuffi et al. 2017, arXiv:1705.08045; 2018,
arXiv:1803.10082): 1 x 1 convolutions before the norm, but with Houlsby's narrow hidden layer and
activation. ``houlsby`` adds an adapter after each convolution of a residual block, as the paper
does. ``pfeiffer`` adds only the last, and learns less (docs/results.md). Grouped convolutions get
no adapter. Without residual blocks, each convolution gets an adapter.

``up`` starts at zero, so training starts at the base model. Adapters are non-linear and cannot be
merged: served and exported models contain them. Omitted: training the norms.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from luthier.adaptations.base import Adaptation, full_rate
from luthier.errors import RecipeError
from luthier.models.networks.heads import frozen_parts, head_modules, is_inside
from luthier.models.networks.layers import replace_modules

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = re.compile(
    r"(o_proj|attention\.output\.dense|attn\.c_proj|attention\.dense|Attention\.o|att(n|ention)\.out_proj"
    r"|attention_output|attn\d\.to_out\.0)$"
)
# BERT names the ends of both sublayers `output.dense`; the look-behind excludes the attention's.
_FEED_FORWARD = re.compile(
    r"(down_proj|(?<!attention\.)output\.dense|mlp\.c_proj|ffn_output|DenseReluDense\.wo|ff\.layer_2"
    r"|(mlp|layers\.\d+)\.fc2|feed_forward\.output_dense|layers\.\d+\.linear2|pwconv2|ff\.net\.2)$"
)
_CONVOLUTION = re.compile(
    r"(^|\.)((?P<block>layers\.\d+)\.layer\.\d+\.convolution|reduce_1x1\.convolution|project_conv"
    r"|project\.0|conv2|features\.\d+|(encoder|decoder|stages)\.\d+\.(conv|linear))$"
)
"""Names of convolutions at the end of a block. If several match a block, the last counts."""
_INNER_CONVOLUTION = re.compile(
    r"(^|\.)(layers\.\d+\.layer\.\d+\.convolution|expand_1x1\.convolution|expand_conv|expand\.0|conv1)$"
)


class Adapters(Adaptation):
    """Train a bottleneck after the sublayers of each layer, or after convolutions.

    Use ``lora`` for merged exports: bottlenecks are non-linear and cannot be merged.
    """

    method: Literal["adapters"] = "adapters"

    placement: Literal["houlsby", "pfeiffer"] | None = None
    """After both sublayers and each convolution, or the last; houlsby of convolutions if not given."""
    reduction_factor: float = Field(default=16.0, gt=0, le=100_000)
    """Ratio of the layer's width to the bottleneck's width."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation function of the bottleneck."""

    mergeable: ClassVar[bool] = False

    def bind_network(self, model: nn.Module) -> Self:
        """Return the adaptation with the placement that suits the network's blocks."""
        placement = self.placement or ("houlsby" if _inner_convolutions(model) else "pfeiffer")
        return self.model_copy(update={"placement": placement})

    def adapt(self, model: nn.Module) -> None:
        """Wrap the last layer of each sublayer or block; freeze everything else."""
        from luthier.adaptations.adapter_layer import bottleneck_after

        last = [*_ends(model, _FEED_FORWARD), *_ends(model, _CONVOLUTION)]
        placement = self.bind_network(model).placement
        inner = [*_ends(model, _ATTENTION), *_inner_convolutions(model)]
        first = inner if placement == "houlsby" else []
        if not last or (placement == "houlsby" and not first):
            family = getattr(getattr(model, "config", None), "model_type", "this type")
            other = "placement=pfeiffer or lora" if last else "lora"
            raise RecipeError(
                f"{placement} adapters do not support networks of type {family}. Use {other}.",
                rule="adapter.network",
            )
        model.requires_grad_(False)
        replace_modules(
            model,
            [*last, *first],
            lambda base: bottleneck_after(base, self.reduction_factor, self.activation),
        )

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return ten times the rate of full fine-tuning, inside the range of Houlsby et al. (3e-5
        to 3e-3)."""
        reason = (
            "new bottlenecks learn faster than tuned weights: ten times the rate of full tuning"
        )
        return float(f"{10 * full_rate(hidden):.1e}"), reason


def _inner_convolutions(model: nn.Module) -> list[str]:
    """Return the names of convolutions that are not the last of their block."""
    last = _ends(model, _CONVOLUTION)
    return [name for name in _ends(model, _INNER_CONVOLUTION) if name not in last]


def _ends(model: nn.Module, kind: re.Pattern[str]) -> list[str]:
    """Return the names of layers that end a sublayer of ``kind``, in network order, without heads
    and preprocessing layers."""
    from torch import Tensor

    others = (*head_modules(model), *frozen_parts(model))
    last = dict[str, str]()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_layer = isinstance(weight, Tensor) and weight.dim() in (2, 4)  # and no norm
        if is_layer and (match := kind.search(name)) and not is_inside(name, others):
            block = match.groupdict().get("block")
            # The key is the block, so that a later match in the same block replaces an earlier one.
            last[name[: match.end("block")] if block else name] = name
    return [*last.values()]
