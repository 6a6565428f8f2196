"""Adaptations: the choice of trained weights. One file per adaptation, and the table of all
adaptations."""

from luthier.adaptations.adapters import Adapters
from luthier.adaptations.base import Adaptation
from luthier.adaptations.bitfit import BitFit
from luthier.adaptations.feature_extraction import FeatureExtraction
from luthier.adaptations.freeze import Freeze
from luthier.adaptations.full import Full
from luthier.adaptations.lora import LoRA
from luthier.adaptations.prefix import Prefix
from luthier.adaptations.prompt import Prompt
from luthier.adaptations.qlora import QLoRA
from luthier.adaptations.sparse import Sparse
from luthier.plugins import PluginTable

ADAPTATIONS: PluginTable[type[Adaptation]] = PluginTable(
    "adaptations",
    Adaptation,
    {
        "full": Full,
        "freeze": Freeze,
        "feature_extraction": FeatureExtraction,
        "lora": LoRA,
        "qlora": QLoRA,
        "bitfit": BitFit,
        "adapters": Adapters,
        "prompt": Prompt,
        "prefix": Prefix,
        "sparse": Sparse,
    },
)

__all__ = [
    "ADAPTATIONS",
    "Adaptation",
    "Adapters",
    "BitFit",
    "FeatureExtraction",
    "Freeze",
    "Full",
    "LoRA",
    "Prefix",
    "Prompt",
    "QLoRA",
    "Sparse",
]
