"""Training objectives, one file per objective. The table in this file lists all."""

from luthier.objectives.base import Objective
from luthier.objectives.bilm import BiLM
from luthier.objectives.causal_lm import CausalLM
from luthier.objectives.classification import Classification
from luthier.objectives.contrastive import Contrastive
from luthier.objectives.distillation.embeddings import EmbeddingDistillation
from luthier.objectives.distillation.encoders import EncoderDistillation
from luthier.objectives.distillation.logits import LogitDistillation
from luthier.objectives.distillation.on_policy import OnPolicyDistillation
from luthier.objectives.distillation.sdft import SDFT
from luthier.objectives.masked_lm import MaskedLM
from luthier.objectives.preferences.dpo import DPO
from luthier.objectives.preferences.kto import KTO
from luthier.objectives.preferences.listwise_dpo import ListwiseDPO
from luthier.objectives.preferences.orpo import ORPO
from luthier.objectives.preferences.reward_model import RewardModel
from luthier.objectives.preferences.simpo import SimPO
from luthier.objectives.question_answering import QuestionAnswering
from luthier.objectives.regression import Regression
from luthier.objectives.reinforcement.grpo import GRPO
from luthier.objectives.reinforcement.ppo import PPO
from luthier.objectives.reranker import Reranker
from luthier.objectives.semi_supervised import SemiSupervised
from luthier.objectives.sft import SFT
from luthier.objectives.span_corruption import SpanCorruption
from luthier.objectives.token_classification import TokenClassification
from luthier.plugins import PluginTable

# The order counts: the first objective that suits a row shape is the default (by_shape.py).
OBJECTIVES: PluginTable[type[Objective]] = PluginTable(
    "objectives",
    Objective,
    {
        "sft": SFT,
        "causal_lm": CausalLM,
        "masked_lm": MaskedLM,
        "span_corruption": SpanCorruption,
        "bilm": BiLM,
        "classification": Classification,
        "semi_supervised": SemiSupervised,
        "regression": Regression,
        "token_classification": TokenClassification,
        "question_answering": QuestionAnswering,
        "contrastive": Contrastive,
        "reranker": Reranker,
        "logit_distillation": LogitDistillation,
        "on_policy_distillation": OnPolicyDistillation,
        "sdft": SDFT,
        "encoder_distillation": EncoderDistillation,
        "embedding_distillation": EmbeddingDistillation,
        "dpo": DPO,
        "listwise_dpo": ListwiseDPO,
        "kto": KTO,
        "orpo": ORPO,
        "simpo": SimPO,
        "reward_model": RewardModel,
        "grpo": GRPO,
        "ppo": PPO,
    },
)

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "PPO",
    "SDFT",
    "SFT",
    "BiLM",
    "CausalLM",
    "Classification",
    "Contrastive",
    "EmbeddingDistillation",
    "EncoderDistillation",
    "ListwiseDPO",
    "LogitDistillation",
    "MaskedLM",
    "Objective",
    "OnPolicyDistillation",
    "QuestionAnswering",
    "Regression",
    "Reranker",
    "RewardModel",
    "SemiSupervised",
    "SimPO",
    "SpanCorruption",
    "TokenClassification",
]
