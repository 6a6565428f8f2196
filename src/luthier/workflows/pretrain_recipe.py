"""The recipe of a base model: text, network, tokenizer and training.

The counterpart of :class:`luthier.recipe.Recipe` for ``luthier pretrain``: read from TOML, the
command line or Python, and stored with the base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SerializeAsAny, field_validator

from luthier.adaptations import Adaptation, Full
from luthier.errors import RecipeError
from luthier.models.bpe import DECODER, ENCODER, ENCODER_DECODER, SpecialTokens
from luthier.models.catalog import CATALOG
from luthier.models.network_shapes import Family, Size
from luthier.objectives import OBJECTIVES, Objective
from luthier.recipe import ModelName, Training, adaptation_of, parse
from luthier.validation import StrictModel

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat


class Corpus(StrictModel):
    """Training and held-out text."""

    train: tuple[Path, ...] = Field(min_length=1)
    """Files of raw text: .txt, .md, or JSONL with a text in each row. They may exceed the memory."""
    validation: tuple[Path, ...] = ()
    """Validation files; by default some documents or the end of the text are held out."""
    validation_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of held-out text if no validation file is given; 0 for none."""


class NewNetwork(StrictModel):
    """The network to build or to continue."""

    base: str | None = None
    """A model for continued pre-training, with its tokenizer; by default a new network is built."""
    family: Family = "llama"
    """Kind of network: ``llama``, ``gpt2``, ``bert`` (Devlin et al. 2019: an encoder of masked
    words), ``t5`` (Raffel et al. 2020: an encoder-decoder that fills gaps), ``palm`` (Chowdhery et
    al. 2022: parallel layers, one key head), ``transfo_xl`` (Dai et al. 2019: recurrent segments) or
    ``lstm`` (Zaremba et al. 2014: recurrent layers, trained in full)."""
    size: Size | None = None
    """Approximate number of weights; by default chosen from the amount of text."""
    config: Path | None = None
    """A config.json to build from instead of family and size."""
    context: int | None = Field(default=None, ge=8)
    """Longest input and training sequence in tokens; with ``base``, only the training sequence, 512
    by default."""


class NewTokenizer(StrictModel):
    """The tokenizer to train."""

    vocabulary: int | None = Field(default=None, ge=1)
    """Tokens at most; at least 256 bytes and the special tokens: 257, 260 for ``bert`` and 358 for
    ``t5``."""
    sample: int = Field(default=50_000_000, ge=1)
    """Most characters to train the tokenizer on, spread over the text."""


class PretrainTraining(Training):
    """The settings of :class:`~luthier.recipe.Training` with the defaults of pre-training."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices only (0.1 as in Brown et al. 2020, appendix B)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients (0.95 as in Brown et al. 2020, appendix B)."""


class PretrainRecipe(StrictModel):
    """All settings of a new base model."""

    name: ModelName
    """Id of the base model; of an adapter, the id is ``base:name``."""
    data: Corpus
    """Training and held-out text."""
    network: NewNetwork = NewNetwork()
    """Network to build or to continue."""
    tokenizer: NewTokenizer = NewTokenizer()
    """Tokenizer to train."""
    adaptation: SerializeAsAny[Adaptation] = Full()
    """Trained weights of ``network.base``: all for a new base model, or an adapter for a custom
    model of that base."""
    training: PretrainTraining = PretrainTraining()
    """Optimization settings."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name in CATALOG:
            raise ValueError("a base model of the catalogue has this name; choose a different name")
        return name

    @field_validator("adaptation", mode="before")
    @classmethod
    def _adaptation(cls, value: Any) -> Any:
        return adaptation_of(value)

    @property
    def makes_adapter(self) -> bool:
        """True if the result is an adapter of ``network.base``."""
        return not self.adaptation.stores_network

    @staticmethod
    def parse(fields: dict[str, Any]) -> PretrainRecipe:
        """Return the recipe for plain values; :class:`RecipeError` names each invalid field."""
        network, tokenizer = fields.get("network"), fields.get("tokenizer")
        if isinstance(network, dict) and network.get("base") is not None:
            new = [name for name in ("family", "size", "config") if name in network]
            new += [name for name in ("vocabulary", "sample") if name in (tokenizer or {})]
            if new:
                raise RecipeError(
                    f"`network.base` has a network and tokenizer. Remove {', '.join(new)}, or the base."
                )
        if (
            isinstance(network, dict)
            and "config" in network
            and network.keys() & {"family", "size"}
        ):
            raise RecipeError(
                "A configuration file sets the family and size. Remove `--family` and `--size`."
            )
        recipe = parse(PretrainRecipe, fields)
        if recipe.adaptation.method != "full" and recipe.network.base is None:
            raise RecipeError(
                f"`adaptation` {recipe.adaptation.method} needs a trained base model. Set "
                "`network.base`, or remove `adaptation`."
            )
        vocabulary, special = recipe.tokenizer.vocabulary, recipe.special_tokens
        if vocabulary is not None and vocabulary < special.smallest:
            raise RecipeError(
                f"`tokenizer.vocabulary` is {vocabulary}, and the minimum for "
                f"{recipe.network.family} is {special.smallest}: 256 bytes and "
                f"{len(special.tokens)} special tokens. Increase the value.",
                setting="tokenizer.vocabulary",
            )
        return recipe

    def plain(self) -> dict[str, Any]:
        """Return JSON values without unset fields."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def method(self) -> str:
        """Method of the training objective."""
        family = self.network.family if self.network.base is None else None
        return {"bert": "masked_lm", "t5": "span_corruption"}.get(str(family), "causal_lm")

    @property
    def special_tokens(self) -> SpecialTokens:
        """Special tokens of a new tokenizer."""
        special = {"masked_lm": ENCODER, "span_corruption": ENCODER_DECODER}
        return special.get(self.method, DECODER)

    def objective(self, chat: ChatFormat, context: int) -> Objective:
        """Return the training objective, in sequences of ``context`` tokens."""
        return OBJECTIVES[self.method].model_validate({"sequence_length": context}).fit([], chat)
