"""What a base model is made from: text, a network and its tokenizer, and a training.

The counterpart of :class:`luthier.recipe.Recipe` for ``luthier pretrain``: read from TOML, from the
command line and from Python, and stored with the base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from luthier.adaptations import Adaptation, Full
from luthier.errors import RecipeError
from luthier.models.bpe import SMALLEST
from luthier.models.catalog import CATALOG
from luthier.models.presets import Family, Size
from luthier.objectives.causal_lm import CausalLM
from luthier.recipe import ModelName, Training, adaptation_of, parse
from luthier.validation import StrictModel


class Corpus(StrictModel):
    """Which text is learned from and which is held out."""

    train: tuple[Path, ...] = Field(min_length=1)
    """Files of raw text: .txt, .md, or JSONL with a text in each row. They may exceed the memory."""
    validation: tuple[Path, ...] = ()
    """Files to measure on; without any, a part of the documents or the end of the text is held out."""
    validation_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the text to hold out when no validation file is given; 0 for none."""


class NewNetwork(StrictModel):
    """The network that is built, or gone on with."""

    base: str | None = None
    """A model to go on from, with its weights and its tokenizer (continued pre-training); a network of
    random weights is built when not given."""
    family: Family = "llama"
    """Kind of network; ``palm`` has parallel layers and one key head (Chowdhery et al. 2022),
    ``transfo_xl`` segments that remember (Dai et al. 2019). ELMo's is not among them: it reads
    characters, and learns from both sides with ``bilm``, where pre-training makes a tokenizer and
    writes from left to right."""
    size: Size | None = None
    """Its size, about so many weights; chosen by the text when not given."""
    config: Path | None = None
    """A config.json to build from instead of family and size."""
    context: int | None = Field(default=None, ge=8)
    """Longest input in tokens, and the length of the sequences it is trained on; of ``base`` the
    length of the sequences alone, 512 when not given."""


class NewTokenizer(StrictModel):
    """The tokenizer that is trained."""

    vocabulary: int | None = Field(default=None, ge=SMALLEST)
    """Tokens at most; 256 bytes and the end-of-text token are the least."""
    sample: int = Field(default=50_000_000, ge=1)
    """Characters of the text it is trained on at most, spread over all of it."""


class PretrainTraining(Training):
    """The settings of :class:`~luthier.recipe.Training` with the defaults of pre-training."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices only (0.1 as in Brown et al. 2020, appendix B)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients (0.95 as in Brown et al. 2020, appendix B)."""


class PretrainRecipe(StrictModel):
    """Everything that decides what a new base model becomes."""

    name: ModelName
    """Id of the base model; of an adapter, the id is ``base:name``."""
    data: Corpus
    """What is learned from."""
    network: NewNetwork = NewNetwork()
    """What is built."""
    tokenizer: NewTokenizer = NewTokenizer()
    """How text becomes tokens."""
    adaptation: SerializeAsAny[Adaptation] = Full()
    """Which weights of ``network.base`` move: all, and the result is a base model; or an adapter beside
    them, and the result is a custom model of that base."""
    training: PretrainTraining = PretrainTraining()
    """How it is trained."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name in CATALOG:
            raise ValueError("this is a base model of the catalogue; choose another name")
        return name

    @field_validator("adaptation", mode="before")
    @classmethod
    def _adaptation(cls, value: Any) -> Any:
        return adaptation_of(value)

    @property
    def makes_adapter(self) -> bool:
        """Whether what is stored is an adapter of ``network.base``, and no network."""
        return not self.adaptation.stores_network

    @staticmethod
    def parse(fields: dict[str, Any]) -> PretrainRecipe:
        """Build one from plain values; :class:`RecipeError` names each bad field."""
        network, tokenizer = fields.get("network"), fields.get("tokenizer")
        if isinstance(network, dict) and network.get("base") is not None:
            new = [name for name in ("family", "size", "config") if name in network]
            new += [name for name in ("vocabulary", "sample") if name in (tokenizer or {})]
            if new:
                raise RecipeError(
                    f"a base that is gone on from has its own network and tokenizer: leave out "
                    f"{', '.join(new)}, or the base"
                )
        if (
            isinstance(network, dict)
            and "config" in network
            and network.keys() & {"family", "size"}
        ):
            raise RecipeError(
                "a config.json says family and size itself: give --config, or --family and --size"
            )
        found = parse(PretrainRecipe, fields)
        if found.adaptation.method != "full" and found.network.base is None:
            raise RecipeError(
                f"`adaptation` {found.adaptation.method} trains beside a network that has learned, and "
                "this one starts from random weights. Give the base that is gone on from "
                "(`network.base`), or leave the adaptation out"
            )
        return found

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, unset fields left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def objective(self, context: int) -> CausalLM:
        """What is learned: each token from those before it, in sequences of ``context`` tokens."""
        return CausalLM(sequence_length=context)
