"""The record of a model, ``luthier.json``: what it is, where it comes from, and what was checked.

It is what the certificate of a custom model is made of. A model is a model once its record is there.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.data.sentence import SentencePipeline
from luthier.errors import CorruptFile
from luthier.files import read_json, write_json
from luthier.validation import describe_constraint

MANIFEST = "luthier.json"
CERTIFICATE, REPORTS, SIGNATURE = "certificate.json", "reports", "model.sig"
"""What is made of a model later, beside its record: none of it decides what the model answers."""
OWN_FILES = frozenset({MANIFEST, CERTIFICATE, REPORTS, SIGNATURE})
"""Files and folders of a model that are luthier's own, and no part of its network or tokenizer."""
RANDOM = "random:"
"""How the ``source`` of a base model begins whose weights were drawn."""


UNMEASURED = "what it forgot was not measured yet, which resuming its run does"
"""Why a model is withheld that was trained a moment ago."""


def created_now() -> str:
    """This moment as records say when they were made: ISO 8601, UTC, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Record(BaseModel):
    """What is written with a model: fixed fields, none unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TextFormat(Record):
    """How a model reads and ends texts, beside the tokenizer in its folder."""

    template: Literal["chat", "plain", "none"]
    """The tokenizer's chat template, or texts as they are; ``none`` where no texts are read."""
    stop_ids: tuple[int, ...]
    """Tokens that end a reply."""
    start_id: int | None = None
    """Token that the decoder of an encoder-decoder starts from."""
    opening_ids: tuple[int, ...] = ()
    """Tokens between ``start_id`` and a reply."""
    closing_ids: tuple[int, ...] = ()
    """Tokens after a reply in the decoder; the first of ``stop_ids`` if empty."""
    sentence: SentencePipeline | None = None
    """Pipeline of a sentence encoder; ``None`` for other models, and in earlier records."""


class LossMask(Record):
    """Which tokens the loss counts: it shows that replies are learned whole, and prompts are not."""

    sha256: str
    """Of the token ids and weights of all training rows, in their order."""
    stretches: int
    """Of tokens that are learned, one behind the other: replies, where rows are conversations."""
    behind_opening: int
    """Those that begin right behind what the template puts before a reply."""
    with_stop: int
    """Those that end with a stop token."""


class DataRecord(Record):
    """The rows that a model was trained and measured on."""

    sha256: dict[str, str]
    """Hash of each file, by path."""
    dropped: int
    """Rows left out as too long, where that was asked for."""
    truncated: int
    """Rows cut as too long, where that was asked for."""
    held_out: dict[str, list[int]]
    """Lines by training file that the model was measured on."""
    rows: int
    validation_rows: int
    examples: int
    """What the rows became: packed texts are fewer."""
    tokens: int
    learned_tokens: int
    mask: LossMask | None = None
    """``None`` where tokens are not learned one by one, and in records of older versions."""
    mix: list[dict[str, Any]]
    """Further files: their path and weight, their rows, and rows in each pass."""


class TokenDifference(Record):
    """A place where two that should be the same find another token likeliest."""

    row: int
    """Number of the row or prompt among those that were compared, from 0."""
    position: int
    """Tokens of the row before it."""
    token: int
    """What the model itself finds likeliest: as it was trained, or in torch."""
    other_token: int
    """What the other finds likeliest: what was read back, or other software."""
    margin: float
    """Nats by which the model finds its own token likelier than the other's."""
    other_margin: float | None
    """Nats by which the other finds its token likelier than the model's; ``None`` where unknown."""

    def describe(self, text_of: Callable[[int], str] | None = None) -> str:
        """In words; ``text_of`` gives the text of a token, where texts may be shown."""

        def name(token: int) -> str:
            return str(token) if text_of is None else f"{token} ({text_of(token)!r})"

        back = ""
        if self.other_margin is not None:
            back = f" and the other {self.other_margin:.2g} nats less likely"
        return (
            f"the first other token is in row {self.row} at position {self.position}: "
            f"{name(self.other_token)}, and not {name(self.token)}, which the model finds "
            f"{self.margin:.2g} nats likelier{back}"
        )


class TokenParity(Record):
    """How a network answers beside another that should be the same."""

    tokens: int
    """Places that were compared, each behind the same tokens."""
    agreement: float
    """Share of them in which both find the same token likeliest."""
    mean_kl: float
    """KL divergence of the next token, in nats, on average."""
    max_kl: float
    median_kl: float | None = None
    """The same for the median place; ``None`` in records of older versions."""
    first_difference: TokenDifference | None = None
    """``None`` where there is none, and in records of older versions."""

    def describe(self) -> str:
        """Agreement and divergence, in words."""
        return (
            f"the likeliest token is the same at {self.agreement:.1%} of {self.tokens} places, and its "
            f"probabilities are {self.mean_kl:.2g} nats a token from the model's (largest "
            f"{self.max_kl:.2g})"
        )

    def difference_text(self, text_of: Callable[[int], str] | None = None) -> str:
        """The first difference, behind what was said of the whole; empty where there is none."""
        first = self.first_difference
        return "" if first is None else f"; {first.describe(text_of)}"


class GgufParity(TokenParity):
    """How near llama.cpp's answers are to the model's own, in each place of what llama.cpp wrote behind
    a few prompts. Tokens that are unlikely to it count as one."""

    rounded_kl: float
    """The mean with the model's weights rounded as in the file: what llama.cpp computes otherwise."""


class Parity(Record):
    """The network as it was trained beside what was read back from disk."""

    rows: int
    trained: float
    """Loss as trained, in nats per learned token; ``reloaded`` is that of what was read back."""
    reloaded: float
    rounded: bool = False
    """Whether weights were merged and rounded on the way."""
    next_tokens: TokenParity | None = None
    """Of a network that writes, what it says next in these rows."""
    greedy: TokenParity | None = None
    """The same behind a few prompts along what the trained network writes greedily, step by step."""
    greedy_beside_base: TokenParity | None = None
    """The same of an adapter that is served beside its base without being merged."""
    greedy_skipped: str | None = None
    """Why no greedy texts were compared."""


class ExportRecord(Record):
    """A form in which the model was written for other software, and how near it answers there."""

    format: Literal["gguf", "onnx"]
    quantization: str | None = None
    """Type of the weights of a GGUF file."""
    is_adapter: bool = False
    """Whether it is an adapter alone, without its base."""
    created: str
    """ISO 8601, UTC."""
    luthier: str
    """Version that wrote it."""
    files: dict[str, str]
    """SHA-256 of each file that was written, by name."""
    compared_in: str | None
    """The software that answered from the file, with its version; ``None`` if it was not there."""
    tolerance: float | None = None
    """Largest ``tokens.rounded_kl`` or ``score_error`` with which a file is not refused."""
    tokens: GgufParity | None = None
    """Of a GGUF file."""
    score_error: float | None = None
    """Of an ONNX file: the largest difference of a score, beside the largest score."""

    @property
    def name(self) -> str:
        """The form; a model has one record of each."""
        parts = (self.format, self.quantization, "adapter" if self.is_adapter else None)
        return " ".join(part for part in parts if part)

    def describe(self, text_of: Callable[[int], str] | None = None) -> str:
        """The verdict, then how near it is, in words; ``text_of`` is as in :class:`TokenDifference`."""
        if self.tokens is not None:
            return (
                f"{self.compared_in} computes from the file what the model does with rounded weights "
                f"({self.tokens.rounded_kl:.2g} nats a token apart, {self.tolerance:g} are allowed). "
                f"Beside the model as it is, {self.tokens.describe()}"
                f"{self.tokens.difference_text(text_of)}"
            )
        if self.score_error is not None:
            return (
                f"{self.compared_in} gives the model's scores from the file: they differ by up to "
                f"{self.score_error:.1g} of the largest, where {self.tolerance:g} is allowed"
            )
        return "not compared, as its software was not installed"


class QuantizationRecord(Record):
    """What the model loses with weights of one type, on rows of the user."""

    quantization: str
    created: str
    """ISO 8601, UTC."""
    luthier: str
    """Version that measured it."""
    data: dict[str, str]
    """SHA-256 of the files it was measured on, by path."""
    rows: int
    loss: float
    """Nats a learned token, with these weights."""
    difference: float
    """From the loss unquantized; above 0 is worse."""
    error: float
    """Standard error of the difference."""
    kept_share: float | None
    """Of what tuning gained, how much is left; ``None`` where it gained nothing for sure."""
    erases: bool
    """Whether the model is no better for sure than the base any more."""
    file_bytes: int
    """Of the weights in a GGUF file."""

    def describe(self) -> str:
        """In words."""
        if self.erases:
            kept = ", which erases the tune"
        else:
            kept = "" if self.kept_share is None else f", {self.kept_share:.0%} of the tune is left"
        return (
            f"{self.difference:+.4f} ± {self.error:.4f} nats a token on {self.rows:,} rows{kept}, "
            f"{self.file_bytes / 1e6:,.1f} MB"
        )


class Manifest(Record):
    """The record of one model. What does not concern it is ``None``."""

    version: Literal[1] = 1
    """Of the record's form."""
    id: str
    kind: str | None = None
    """Task of its head; ``encoder`` where it has none."""
    created: str = ""
    """ISO 8601, UTC."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each file of the folder, by path."""
    luthier: str | None = None
    """Version that made it."""
    torch: str | None = None
    """Version that made it."""
    precision: str | None = None
    """Number type it was trained in."""

    parent: str | None = None
    """Id of the model it was made from."""
    root: str | None = None
    """Id of the base model at the bottom of the lineage."""
    others: dict[str, str] | None = None
    """Ids of the models that helped in its training, by their part in it."""
    saved: Literal["network", "adapter"] | None = None
    """What the folder holds."""
    recipe: dict[str, Any] | None = None
    """The recipe it was trained by, with nothing left open, as :mod:`luthier.recipe` reads it."""
    plugins: dict[str, str] | None = None
    """Packages that brought the objective or adaptation, with their versions."""
    format: TextFormat | None = None
    tokenizer_from: str | None = None
    """Id of the imported model that its tokenizer and chat template come from."""
    template_approved: bool = False
    """Whether the chat template of an imported model is known, or was approved by an administrator."""
    data: DataRecord | None = None
    data_report: dict[str, Any] | None = None
    """What the gate found in the rows."""
    distillation: dict[str, Any] | None = None
    """The teacher, and what it was asked."""
    student: dict[str, Any] | None = None
    """What was cut from the teacher's network."""
    trained_weights_sha256: str | None = None
    """Of the weights that moved, by name."""
    parity: Parity | None = None
    """The network as trained beside what was read back from disk."""
    exports: list[ExportRecord] | None = None
    """Forms in which it was written for other software, one of each."""
    quantized: list[QuantizationRecord] | None = None
    """What it loses with weights of fewer bits, one of each type."""
    metrics: dict[str, Any] | None = None
    """The result of the run."""
    withheld: str | None = None
    """Why it is not to be used: what it forgot, or that this is still to be measured."""
    accepted: str | None = None
    """The same of a model that is used although it is outside its limits."""

    source: str | None = None
    """Where a model from outside comes from: ``pypi:``, ``hub:``, or an address."""
    source_sha256: str | None = None
    revision: str | None = None
    """Commit of a repository."""
    licence: str | None = None
    parameters: int | None = None
    context: int | None = None
    """Longest input in tokens."""
    adapter_of: str | None = None
    """What an imported adapter calls its base model."""
    left_out: list[str] | None = None
    """Files of the source that were not taken."""
    checks: dict[str, Any] | None = None
    """What an imported model was tried with before it was taken."""

    @property
    def is_random(self) -> bool:
        """Whether all its weights were drawn, and nothing was learned yet."""
        return (self.source or "").startswith(RANDOM)

    @property
    def limits_text(self) -> str:
        """That it is outside its limits, in a sentence; empty where it is not, or none were set."""
        if self.withheld:
            return f"Withheld, not to be used: {self.withheld}."
        return f"Accepted outside its limits: {self.accepted}." if self.accepted else ""

    @property
    def verdict(self) -> str:
        """What came of its run, in a sentence; empty where that is not known."""
        return str(((self.metrics or {}).get("verdict") or {}).get("text", ""))

    @property
    def objective(self) -> dict[str, Any] | None:
        """Fields of the objective it was trained with."""
        return (self.recipe or {}).get("objective")

    def plain(self) -> dict[str, Any]:
        """The record as JSON-ready values, what does not concern the model left out."""
        return {k: v for k, v in self.model_dump(mode="json").items() if v is not None}

    def with_export(self, export: ExportRecord) -> Self:
        """The record with ``export`` in the place of an earlier one of the same form."""
        others = [each for each in self.exports or () if each.name != export.name]
        return self.model_copy(update={"exports": [*others, export]})

    def with_quantized(self, cost: QuantizationRecord) -> Self:
        """Return the record with ``cost`` in place of an earlier one of the same type."""
        others = [e for e in self.quantized or () if e.quantization != cost.quantization]
        return self.model_copy(update={"quantized": [*others, cost]})

    def write(self, folder: Path) -> None:
        """Write it into the model's folder, which makes the model one."""
        write_json(folder / MANIFEST, self.plain())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in ``folder``.

        Raises:
            CorruptFile: where it is no record, or one of a later version of luthier.
        """
        fields = read_json(folder / MANIFEST)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise CorruptFile(
                f"{folder / MANIFEST} is no record of a model: {where}: {describe_constraint(first)}",
                rule="manifest.invalid",
            ) from error
