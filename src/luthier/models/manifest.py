"""Model manifest ``luthier.json``: description, origin and checks of a model.

The certificate of a custom model is derived from the manifest. A folder without a manifest is not a
model.
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
DRIFT_SAMPLE = "drift.npz"
"""Files added to a model later, without an effect on the model's output."""
OWN_FILES = frozenset({MANIFEST, CERTIFICATE, REPORTS, SIGNATURE, DRIFT_SAMPLE})
"""luthier's files and folders in a model folder, not part of network or tokenizer."""
RANDOM = "random:"
"""Prefix of ``source`` for base models with random weights."""


UNMEASURED = "the forgetting measurement is pending; resume the run to complete the measurement"
"""Reason for withholding a model between training and the forgetting measurement."""


def created_now() -> str:
    """This moment as records say when they were made: ISO 8601, UTC, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Record(BaseModel):
    """Base class of manifest records. Unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TextFormat(Record):
    """Chat template and stop tokens of a model."""

    template: Literal["chat", "plain", "none"]
    """``chat`` for the tokenizer's chat template, ``plain`` for raw text, ``none`` without text
    input."""
    stop_ids: tuple[int, ...]
    """Tokens that end a reply."""
    start_id: int | None = None
    """First decoder token of an encoder-decoder."""
    opening_ids: tuple[int, ...] = ()
    """Tokens between ``start_id`` and a reply."""
    closing_ids: tuple[int, ...] = ()
    """Tokens after a reply in the decoder; the first of ``stop_ids`` if empty."""
    sentence: SentencePipeline | None = None
    """Pipeline of a sentence encoder; ``None`` for other models, and in earlier records."""


class LossMask(Record):
    """Statistics of the loss mask: evidence that replies train in full and prompts do not."""

    sha256: str
    """Hash of the token ids and weights of all training rows, in order."""
    stretches: int
    """Number of spans of trained tokens: for conversations, the replies."""
    behind_opening: int
    """Number of spans that start directly after the template's reply opening."""
    with_stop: int
    """Number of spans that end with a stop token."""


class DataRecord(Record):
    """Training and test rows of a model."""

    sha256: dict[str, str]
    """Hash of each file, by path."""
    dropped: int
    """Number of rows dropped as too long, if requested."""
    truncated: int
    """Number of rows truncated as too long, if requested."""
    held_out: dict[str, list[int]]
    """Test rows: line numbers by training file."""
    rows: int
    validation_rows: int
    examples: int
    """Number of examples; lower than the number of rows with packing."""
    tokens: int
    learned_tokens: int
    mask: LossMask | None = None
    """``None`` for objectives without token losses, and in manifests of older versions."""
    mix: list[dict[str, Any]]
    """Additional training files: path, weight, rows, and rows per epoch."""


class TokenDifference(Record):
    """A position at which two networks that should be equal predict different tokens."""

    row: int
    """Index of the row or prompt, from 0."""
    position: int
    """Position in the row."""
    token: int
    """Prediction of the model itself: as trained, or in torch."""
    other_token: int
    """Prediction of the reloaded model or of other software."""
    margin: float
    """Log-probability of ``token`` minus ``other_token`` in the model itself, in nats."""
    other_margin: float | None
    """Log-probability of ``other_token`` minus ``token`` in the other network, in nats; ``None`` if
    unknown."""

    def describe(self, text_of: Callable[[int], str] | None = None) -> str:
        """Return a description. ``text_of`` maps a token to text, if text may be shown."""

        def name(token: int) -> str:
            return str(token) if text_of is None else f"{token} ({text_of(token)!r})"

        reverse = "" if self.other_margin is None else f", reverse margin {self.other_margin:.2g}"
        return (
            f"first difference in row {self.row} at position {self.position}: "
            f"{name(self.other_token)} instead of {name(self.token)} (margin {self.margin:.2g} nats"
            f"{reverse})"
        )


class TokenParity(Record):
    """Agreement of two networks that should be equal."""

    tokens: int
    """Number of compared positions, each with the same preceding tokens."""
    agreement: float
    """Share of positions with the same prediction."""
    mean_kl: float
    """KL divergence of the next token, in nats, on average."""
    max_kl: float
    median_kl: float | None = None
    """Median KL divergence per position; ``None`` in manifests of older versions."""
    first_difference: TokenDifference | None = None
    """``None`` without a difference, and in manifests of older versions."""

    def describe(self) -> str:
        """Agreement and divergence, in words."""
        return (
            f"{self.agreement:.1%} equal predictions at {self.tokens} positions, KL divergence "
            f"{self.mean_kl:.2g} nats per token (maximum {self.max_kl:.2g})"
        )

    def difference_text(self, text_of: Callable[[int], str] | None = None) -> str:
        """Return the description of the first difference as a suffix; empty without a difference."""
        first = self.first_difference
        return "" if first is None else f"; {first.describe(text_of)}"


class GgufParity(TokenParity):
    """Agreement of llama.cpp and the model at each position of llama.cpp's completions of a few
    prompts. llama.cpp's unlikely tokens are merged into one for the KL divergence."""

    rounded_kl: float
    """Mean KL divergence to the model with equally rounded weights: llama.cpp's own error."""


class Parity(Record):
    """Comparison of the trained network with the reloaded network."""

    rows: int
    trained: float
    """Loss of the trained network, in nats per token; ``reloaded`` is the loss after reloading."""
    reloaded: float
    rounded: bool = False
    """True if weights were merged and rounded before saving."""
    next_tokens: TokenParity | None = None
    """Next-token predictions on the compared rows, for text generators."""
    greedy: TokenParity | None = None
    """Predictions along greedy completions of a few prompts, step by step."""
    greedy_beside_base: TokenParity | None = None
    """Predictions along greedy completions with an unmerged adapter on the base network."""
    greedy_skipped: str | None = None
    """Reason for a missing comparison of greedy completions."""


class ExportRecord(Record):
    """An export of the model and its agreement with the model."""

    format: Literal["gguf", "onnx"]
    quantization: str | None = None
    """Type of the weights of a GGUF file; ``int8`` for an ONNX file in 8 bits."""
    is_adapter: bool = False
    """True for an adapter without its base model."""
    created: str
    """ISO 8601, UTC."""
    luthier: str
    """Version of luthier."""
    files: dict[str, str]
    """SHA-256 of each exported file by name."""
    compared_in: str | None
    """Name and version of the software that ran the file; ``None`` if not installed."""
    tolerance: float | None = None
    """Limit of ``tokens.rounded_kl`` or ``score_error`` for an accepted export."""
    tokens: GgufParity | None = None
    """Agreement of a GGUF file."""
    score_error: float | None = None
    """Maximum score difference of an ONNX file, relative to the largest score."""

    @property
    def name(self) -> str:
        """Name of the format. A model has one record per name."""
        parts = (self.format, self.quantization, "adapter" if self.is_adapter else None)
        return " ".join(part for part in parts if part)

    def describe(self, text_of: Callable[[int], str] | None = None) -> str:
        """Return the verdict and the agreement; for ``text_of`` see :class:`TokenDifference`."""
        if self.tokens is not None:
            return (
                f"{self.compared_in} agrees with the model with rounded weights (KL divergence "
                f"{self.tokens.rounded_kl:.2g} nats per token, limit {self.tolerance:g}). Compared "
                f"with the original model: {self.tokens.describe()}"
                f"{self.tokens.difference_text(text_of)}"
            )
        if self.score_error is not None:
            limit = "without a limit" if self.tolerance is None else f"limit {self.tolerance:g}"
            return (
                f"{self.compared_in} returns the model's scores (maximum relative difference "
                f"{self.score_error:.1g}, {limit})"
            )
        return "not compared, because the software is not installed"


class QuantizationRecord(Record):
    """Quality loss of one quantization type on the user's rows."""

    quantization: str
    created: str
    """ISO 8601, UTC."""
    luthier: str
    """Version of luthier."""
    data: dict[str, str]
    """SHA-256 of the evaluation files by path."""
    rows: int
    loss: float
    """Loss with quantized weights, in nats per token."""
    difference: float
    """Difference to the unquantized loss. Positive values are worse."""
    error: float
    """Standard error of the difference."""
    kept_share: float | None
    """Share of the fine-tuning gain that remains; ``None`` without a significant gain."""
    erases: bool
    """True if the quantized model is no longer significantly better than the base model."""
    file_bytes: int
    """Size of the weights in a GGUF file, in bytes."""

    def describe(self) -> str:
        """Return a description."""
        if self.erases:
            gain = ", no gain of the fine-tuning remains"
        else:
            gain = "" if self.kept_share is None else f", {self.kept_share:.0%} of the gain remains"
        return (
            f"{self.difference:+.4f} ± {self.error:.4f} nats per token on {self.rows:,} rows{gain}, "
            f"{self.file_bytes / 1e6:,.1f} MB"
        )


class Manifest(Record):
    """Manifest of one model. Fields that do not apply are ``None``."""

    version: Literal[1] = 1
    """Version of the manifest format."""
    id: str
    kind: str | None = None
    """Task of the head; ``encoder`` without a head."""
    created: str = ""
    """ISO 8601, UTC."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each file of the folder, by path."""
    luthier: str | None = None
    """Version of luthier."""
    torch: str | None = None
    """Version of torch."""
    precision: str | None = None
    """Data type of the training."""

    parent: str | None = None
    """Id of the parent model."""
    root: str | None = None
    """Id of the base model at the bottom of the lineage."""
    others: dict[str, str] | None = None
    """Ids of other models in the training, by role."""
    saved: Literal["network", "adapter"] | None = None
    """Content of the folder."""
    recipe: dict[str, Any] | None = None
    """Training recipe with all defaults, in the format of :mod:`luthier.recipe`."""
    plugins: dict[str, str] | None = None
    """Versions of plugin packages with the objective or adaptation."""
    format: TextFormat | None = None
    tokenizer_from: str | None = None
    """Id of the imported model that provides tokenizer and chat template."""
    template_approved: bool = False
    """True if the chat template of an imported model is known or approved by an administrator."""
    data: DataRecord | None = None
    data_report: dict[str, Any] | None = None
    """Report of the data checks."""
    distillation: dict[str, Any] | None = None
    """Teacher and prompts of a distillation."""
    student: dict[str, Any] | None = None
    """Layers and widths removed from the teacher's network."""
    trained_weights_sha256: str | None = None
    """Hashes of the trained weights by name."""
    parity: Parity | None = None
    """Comparison of the trained network with the reloaded network."""
    exports: list[ExportRecord] | None = None
    """Exports for other software, one per format."""
    quantized: list[QuantizationRecord] | None = None
    """Quality loss by quantization, one record per type."""
    metrics: dict[str, Any] | None = None
    """The result of the run."""
    withheld: str | None = None
    """Reason for withholding the model: measured forgetting, or a pending measurement."""
    accepted: str | None = None
    """Reason for withholding that the user has overruled."""

    source: str | None = None
    """Origin of an imported model: ``pypi:``, ``hub:``, or a URL."""
    source_sha256: str | None = None
    revision: str | None = None
    """Commit of a repository."""
    licence: str | None = None
    parameters: int | None = None
    context: int | None = None
    """Longest input in tokens."""
    adapter_of: str | None = None
    """Base model that an imported adapter names."""
    left_out: list[str] | None = None
    """Ignored files of the source."""
    checks: dict[str, Any] | None = None
    """Checks of an imported model."""

    @property
    def is_random(self) -> bool:
        """True for a base model with random weights."""
        return (self.source or "").startswith(RANDOM)

    @property
    def limits_text(self) -> str:
        """A sentence on exceeded forgetting limits; empty if none are exceeded."""
        if self.withheld:
            return f"Withheld: {self.withheld}."
        return f"Accepted despite exceeded limits: {self.accepted}." if self.accepted else ""

    @property
    def verdict(self) -> str:
        """Verdict of the training run in one sentence; empty if unknown."""
        return str(((self.metrics or {}).get("verdict") or {}).get("text", ""))

    @property
    def objective(self) -> dict[str, Any] | None:
        """Fields of the training objective."""
        return (self.recipe or {}).get("objective")

    def plain(self) -> dict[str, Any]:
        """Return the manifest as JSON values without empty fields."""
        return {k: v for k, v in self.model_dump(mode="json").items() if v is not None}

    def with_export(self, export: ExportRecord) -> Self:
        """Return a manifest with ``export``, which replaces an earlier export of the same format."""
        others = [each for each in self.exports or () if each.name != export.name]
        return self.model_copy(update={"exports": [*others, export]})

    def with_quantized(self, cost: QuantizationRecord) -> Self:
        """Return a manifest with ``cost``, which replaces an earlier record of the same type."""
        others = [e for e in self.quantized or () if e.quantization != cost.quantization]
        return self.model_copy(update={"quantized": [*others, cost]})

    def write(self, folder: Path) -> None:
        """Write the manifest into the model's folder, which completes the model."""
        write_json(folder / MANIFEST, self.plain())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest in ``folder``.

        Raises:
            CorruptFile: for an invalid manifest, or a manifest of a later version of luthier.
        """
        fields = read_json(folder / MANIFEST)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise CorruptFile(
                f"{folder / MANIFEST} is invalid: {where}: {describe_constraint(first)}",
                rule="manifest.invalid",
            ) from error
