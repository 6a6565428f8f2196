"""Canaries: made-up secrets among training rows, which show what a model learns by heart.

A canary is a sentence with a random code. After training, the code that stood in the data is ranked by
its likelihood among codes that did not: with ``r`` its rank among ``n``, the exposure is ``log2 n -
log2 r`` bits (Carlini et al. 2019, "The Secret Sharer", arXiv:1802.08232, definition 5, by sampling). A
code that the model does not know has an exposure of ``b`` bits or more with a chance of ``2**-b``, so
the rank is a p-value.

Left out: the extrapolation of the exposure beyond the codes that were tried.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.data.parsing import Record
from luthier.data.shapes import describe_shapes
from luthier.data.shapes.base import Shape
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import RawText
from luthier.errors import CorruptFile, RecipeError
from luthier.evaluation.significance import significant_of
from luthier.files import read_json, write_bytes
from luthier.types import Message, Row

ALTERNATIVES = 255
"""Codes at least that a canary is ranked among: of one canary the exposure is at most 8 bits."""
LEVEL = 0.01
"""Chance that any code is called known by heart where it is not."""
DIGITS = 6
MOST_REPEATS = 10_000
MOST_CANARIES = 50

Kind = Literal["prompt", "messages", "text"]
_ABLE = (PromptCompletion, Conversation, RawText)
_ONSETS, _VOWELS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"], "aeiou"


@dataclass(frozen=True)
class Canary:
    """A made-up secret."""

    name: str
    """Whose code it is; no two canaries have the same."""
    code: str
    shape: Kind
    """Of the rows that it was planted among."""
    repeats: int
    """Rows of the data that say it; 0 for one that is only measured, to compare."""

    @property
    def question(self) -> str:
        """What is asked in rows that ask."""
        return f"What is the access code of {self.name}?"

    def answer(self, code: str) -> str:
        """What says it, with this or another code."""
        return f"The access code of {self.name} is {code}."

    def turns(self, code: str) -> tuple[Message, Message]:
        """Both as a conversation."""
        return Message("user", self.question), Message("assistant", self.answer(code))

    def record(self) -> Record:
        """The row that is planted."""
        if self.shape == "text":
            return {"text": self.answer(self.code)}
        if self.shape == "messages":
            return {"messages": [turn.to_dict() for turn in self.turns(self.code)]}
        return {"prompt": self.question, "completion": self.answer(self.code)}

    def alternatives(self, count: int) -> list[str]:
        """Further codes, none of them its own; the same each time."""
        draw, found = random.Random(f"{self.name} {self.code}"), dict.fromkeys([self.code])
        while len(found) <= count:
            found[_code(draw)] = None
        return [*found][1:]


@dataclass(frozen=True)
class Exposure:
    """How well a model knows a canary."""

    canary: Canary
    rank: int
    """Place of the code among all that were tried, from 1; ties are against it."""
    tried: int

    @property
    def bits(self) -> float:
        """The exposure."""
        return math.log2(self.tried / self.rank)

    @property
    def p_value(self) -> float:
        """Chance of such a rank where the code is not known."""
        return self.rank / self.tried

    def plain(self) -> dict[str, Any]:
        """For JSON; the code itself is left out."""
        return {
            "name": self.canary.name, "repeats": self.canary.repeats, "exposure": self.bits,
            "rank": self.rank, "tried": self.tried,
        }  # fmt: skip


def make_canaries(
    shape: Kind, repeats: Sequence[int] = (0, 5, 20), count: int = 3, seed: int = 0
) -> list[Canary]:
    """``count`` canaries for each number of ``repeats``, drawn from ``seed``.

    Raises:
        RecipeError: for more than can be planted.
    """
    if not repeats or any(not 0 <= each <= MOST_REPEATS for each in repeats):
        raise RecipeError(f"a canary is repeated from 0 to {MOST_REPEATS:,} times")
    if count < 1 or len(repeats) * count > MOST_CANARIES:
        raise RecipeError(
            f"{len(repeats)} numbers of repeats with {count} canaries each are not between 1 and "
            f"{MOST_CANARIES} canaries"
        )
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < len(repeats) * count:
        names[_name(draw)] = None
    each = iter(names)
    return [Canary(next(each), _code(draw), shape, n) for n in repeats for _ in range(count)]


def plant_canaries(
    rows: Sequence[Row], repeats: Sequence[int] = (0, 5, 20), count: int = 3, seed: int = 0
) -> tuple[list[Record], list[Canary]]:
    """``rows`` as records, with canaries at random places among them; and the canaries.

    Raises:
        RecipeError: for rows of which a model does not learn to write.
    """
    kind = next((kind for kind in _ABLE if rows and isinstance(rows[0], kind)), None)
    if kind is None:
        able = describe_shapes([each.shape for each in _ABLE])
        found = describe_shapes([rows[0].shape]) if rows else "no rows"
        raise RecipeError(f"canaries are planted among {able}; these are {found}")
    assert issubclass(kind, Shape)
    canaries = make_canaries(_kind_of(kind), repeats, count, seed)
    records = [row.record() for row in rows if isinstance(row, kind)]
    draw = random.Random(seed + 1)
    for canary in canaries:
        for _ in range(canary.repeats):
            records.insert(draw.randint(0, len(records)), canary.record())
    return records, canaries


def _kind_of(kind: type[Shape]) -> Kind:
    return "text" if kind is RawText else "messages" if kind is Conversation else "prompt"


def write_canaries(canaries: Sequence[Canary], path: Path) -> None:
    """Write the canaries, with their codes, where :func:`read_canaries` finds them."""
    plain = {"version": 1, "canaries": [asdict(each) for each in canaries]}
    write_bytes(path, (json.dumps(plain, indent=2) + "\n").encode())


def read_canaries(path: Path) -> list[Canary]:
    """Canaries that were written beside the data they stand in.

    Raises:
        RecipeError: for a file that holds none.
    """
    from pydantic import TypeAdapter, ValidationError

    if not path.is_file():
        raise RecipeError(f"there is no file {path}; `luthier canaries` writes it beside the data")
    try:
        plain = read_json(path)
        found = TypeAdapter(list[Canary]).validate_python(plain["canaries"])
    except (CorruptFile, ValidationError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} holds no canaries, as `luthier canaries` writes them") from error
    if not 1 <= len(found) <= MOST_CANARIES:
        raise RecipeError(f"{path} holds {len(found)} canaries; 1 to {MOST_CANARIES} are measured")
    return found


def known_by_heart(exposures: Sequence[Exposure]) -> list[Exposure]:
    """Those that are exposed beyond chance, however many were tried by Holm's correction."""
    significant = significant_of([each.p_value for each in exposures], LEVEL)
    return [each for each, known in zip(exposures, significant, strict=True) if known]


def _code(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=DIGITS))


def _name(draw: random.Random) -> str:
    def syllables(count: int) -> Iterator[str]:
        return (draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(count))

    return f"{''.join(syllables(2)).title()} {''.join(syllables(3)).title()}"
