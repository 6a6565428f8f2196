"""What can be learned. One file for each objective; this table is the map of the package."""

from luthier.objectives.base import Objective
from luthier.objectives.bilm import BiLM
from luthier.objectives.causal_lm import CausalLM
from luthier.objectives.classification import Classification
from luthier.objectives.contrastive import Contrastive
from luthier.objectives.grpo import GRPO
from luthier.objectives.masked_lm import MaskedLM
from luthier.objectives.ppo import PPO
from luthier.objectives.regression import Regression
from luthier.objectives.semi_supervised import SemiSupervised
from luthier.objectives.sft import SFT
from luthier.objectives.span_corruption import SpanCorruption
from luthier.objectives.token_classification import TokenClassification

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": SFT,
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "span_corruption": SpanCorruption,
    "bilm": BiLM,
    "classification": Classification,
    "semi_supervised": SemiSupervised,
    "regression": Regression,
    "token_classification": TokenClassification,
    "contrastive": Contrastive,
    "grpo": GRPO,
    "ppo": PPO,
}

__all__ = [
    "GRPO",
    "OBJECTIVES",
    "PPO",
    "SFT",
    "BiLM",
    "CausalLM",
    "Classification",
    "Contrastive",
    "MaskedLM",
    "Objective",
    "Regression",
    "SemiSupervised",
    "SpanCorruption",
    "TokenClassification",
]
