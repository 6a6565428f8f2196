"""Adapters: small bottlenecks inside a frozen network (Houlsby et al. 2019, arXiv:1902.00751).

A bottleneck ``y + up(act(down(y)))`` follows the last projection of each sublayer. ``houlsby`` puts
one after attention and one after the feed-forward part of each layer, ``pfeiffer`` (Pfeiffer et al.
2021, arXiv:2005.00247) only the latter. ``up`` is zero at the start, so that training begins at the
base model. Being non-linear they cannot be merged: served and exported models keep them. Left out:
training the layer norms beside them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, full_rate
from luthier.errors import RecipeError
from luthier.models.layers import replace_modules

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = re.compile(
    r"(o_proj|attention\.output\.dense|attn\.c_proj|attention\.dense|Attention\.o)$"
)
_FEED_FORWARD = re.compile(
    r"(down_proj|(?<!attention\.)output\.dense|mlp\.c_proj|ffn_output|DenseReluDense\.wo|ff\.layer_2)$"
)


class Adapters(Adaptation):
    """Train a bottleneck after the sublayers of each layer."""

    method: Literal["adapters"] = "adapters"

    takes_media: ClassVar[bool] = False
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """After attention and feed-forward, or after feed-forward only."""
    reduction_factor: float = Field(default=16.0, gt=0, le=100_000)
    """The bottleneck is so many times narrower than the network."""
    activation: Literal["gelu", "relu"] = "gelu"
    """What bends the bottleneck."""

    mergeable: ClassVar[bool] = False

    @property
    def shares_base(self) -> bool:
        """Bottlenecks change each row by itself."""
        return True

    def adapt(self, model: nn.Module) -> None:
        """Wrap the last projection of each sublayer; freeze everything else."""
        from luthier.adaptations.adapter_layer import Bottleneck

        kinds = [_FEED_FORWARD, *([_ATTENTION] if self.placement == "houlsby" else [])]
        found = [[n for n, _ in model.named_modules() if kind.search(n)] for kind in kinds]
        if not all(found):
            family = getattr(getattr(model, "config", None), "model_type", "this type")
            other = "placement=pfeiffer or lora" if found[0] else "lora"
            raise RecipeError(
                f"{self.placement} adapters do not know where the sublayers of networks of type "
                f"{family} end. Use {other}."
            )
        names = [name for names in found for name in names]
        model.requires_grad_(False)
        hidden = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        width = max(1, round(hidden / self.reduction_factor))
        replace_modules(model, names, lambda base: Bottleneck(base, hidden, width, self.activation))

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Ten times that of full fine-tuning, inside what Houlsby et al. search (3e-5 to 3e-3)."""
        reason = (
            "new bottlenecks learn faster than tuned weights: ten times the rate of full tuning"
        )
        return float(f"{10 * full_rate(hidden):.1e}"), reason
