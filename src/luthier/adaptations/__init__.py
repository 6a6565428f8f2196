"""Which weights move. One file for each adaptation; this table is the map of the package."""

from luthier.adaptations.base import Adaptation
from luthier.adaptations.freeze import Freeze
from luthier.adaptations.full import Full
from luthier.adaptations.lora import LoRA

ADAPTATIONS: dict[str, type[Adaptation]] = {
    "full": Full,
    "freeze": Freeze,
    "lora": LoRA,
}

__all__ = ["ADAPTATIONS", "Adaptation", "Freeze", "Full", "LoRA"]
