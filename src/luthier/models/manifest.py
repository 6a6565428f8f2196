"""The record of a model, ``luthier.json``: what it is, where it comes from, and what was checked.

It is what the certificate of a custom model is made of. A model is a model once its record is there.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    """Id of the model from outside that its tokenizer and template come from."""
    data: DataRecord | None = None
    data_report: dict[str, Any] | None = None
    """What the gate found in the rows."""
    distillation: dict[str, Any] | None = None
    """The teacher, and what it was asked."""
    student: dict[str, Any] | None = None
    """What was cut from the teacher's network."""
    soup: dict[str, Any] | None = None
    """The models whose weights it is the mean of, and its share between them and their base."""
    trained_weights_sha256: str | None = None
    """Of the weights that moved, by name."""
    parity: dict[str, Any] | None = None
    """The loss as trained and as read back from disk."""
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
    def objective(self) -> dict[str, Any] | None:
        """Fields of the objective it was trained with."""
        return (self.recipe or {}).get("objective")

    def plain(self) -> dict[str, Any]:
        """The record as JSON-ready values, what does not concern the model left out."""
        return {k: v for k, v in self.model_dump(mode="json").items() if v is not None}

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
                f"{folder / MANIFEST} is no record of a model: {where}: {describe_constraint(first)}"
            ) from error
