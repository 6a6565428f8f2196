"""What can be learned. One file for each objective; this table is the map of the package."""

from luthier.objectives.base import Objective
from luthier.objectives.causal_lm import CausalLM
from luthier.objectives.sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": SFT,
    "causal_lm": CausalLM,
}

__all__ = ["OBJECTIVES", "SFT", "CausalLM", "Objective"]
