"""Shapes of preferences, and the conversion of judged answers to pairs.

Preferences have several notations:

- ``{"prompt", "chosen", "rejected"}``; the prompt is a text or a list of messages, each answer a
  text, a message or a list of messages.
- ``{"chosen", "rejected"}``, two conversations with a common beginning.
- OpenAI's ``{"input": {"messages"}, "preferred_output", "non_preferred_output"}``.
- ``{"prompt", "completion"}`` with ``rating`` or ``score``.
- ``{"prompt", "completion"}`` or ``{"messages"}`` with ``label``, ``kto_tag`` (LLaMA-Factory) or
  ``thumb``: true or false, 1 or 0, or a word of :data:`THUMBS`.

A rejected answer may be empty, which teaches not to stop at once. An empty chosen answer is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar, Self

from luthier.data.conversations.turn_marks import truth_of
from luthier.data.disk_sequence import spool
from luthier.data.field_checks import (
    DECIMAL_COMMA,
    FieldChecker,
    Turns,
    check_not_blank,
    check_turn_order,
    read_prompt,
    read_rating,
    read_turns,
)
from luthier.data.files.parsing import Record, json_kind, quote
from luthier.data.shapes.base import ENOUGH_HINTS, Shape
from luthier.data.shapes.conversations import Conversation, tool_record
from luthier.errors import DataError, Location, Problem, RowRefused
from luthier.types import Part, Row, Text, Tool

THUMB_KEYS = ("thumb", "label", "kto_tag")
"""Keys of a thumb, in order of preference."""
THUMBS: Mapping[str, bool] = {
    "up": True, "down": False, "good": True, "bad": False, "desirable": True, "undesirable": False,
    "thumbs_up": True, "thumbs_down": False, "thumbs up": True, "thumbs down": False,
    "accepted": True, "refused": False, "rejected": False, "like": True, "dislike": False,
    "+1": True, "-1": False,
}  # fmt: skip
"""Words for a thumb, next to the words for true and false."""
MOST_ANSWERS = 64
"""Most ranked answers of a row; listwise DPO computes all answers in one micro-batch."""


@dataclass(frozen=True, slots=True)
class JudgedAnswers(Shape):
    """Base of shapes with judged answers to a prompt."""

    enough: ClassVar[int] = ENOUGH_HINTS

    messages: Turns
    """The prompt."""
    tools: tuple[Tool, ...] = field(default=(), kw_only=True)

    def answers(self) -> tuple[Turns, ...]:
        """Return all answers, the best first."""
        raise NotImplementedError

    def judgement(self) -> tuple[str, ...]:
        """Return the judgement as text; rows with different judgements teach different targets."""
        return tuple(turn.whole_text for turn in self.answers()[0])

    def inputs(self) -> tuple[str, ...]:
        return tuple(f"{turn.role}: {turn.whole_text}" for turn in self.messages)

    def targets(self) -> tuple[str, ...]:
        """Return the best answer, and the other answers with a mark."""
        best, *others = self.answers()
        rejected = (f"not: {turn.whole_text}" for answer in others for turn in answer)
        # "None" stands for the judgement of single answers; near-duplicate counts depend on it.
        return (*(turn.whole_text for turn in best), *rejected, "None")

    def turns(self) -> Turns:
        return (*self.messages, *self.answers()[0])

    def sides(self) -> list[Row]:
        return [
            Conversation(self.file, self.line, (*self.messages, *answer), tools=self.tools)
            for answer in self.answers()
        ]


@dataclass(frozen=True, slots=True)
class Preference(JudgedAnswers):
    """A prompt with a chosen and a rejected answer."""

    shape: ClassVar[str] = "preference"
    title: ClassVar[str] = '{"prompt", "chosen", "rejected"}'
    openai_title: ClassVar[str] = '{"input", "preferred_output", "non_preferred_output"}'
    openai_keys: ClassVar[tuple[str, ...]] = ("input", "preferred_output", "non_preferred_output")
    noun: ClassVar[str] = "chosen and rejected answers"
    keys: ClassVar[tuple[str, ...]] = ("chosen", "rejected", *openai_keys[1:])
    complete: ClassVar[tuple[frozenset[str], ...]] = tuple(frozenset((key,)) for key in keys)
    optional_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "completion", "input", "score_chosen", "score_rejected")
    )
    number_keys: ClassVar[frozenset[str]] = frozenset(("score_chosen", "score_rejected"))
    object_keys: ClassVar[frozenset[str]] = frozenset(
        ("prompt", "chosen", "rejected", *openai_keys)
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "messages": "input",
        "chosen": "target",
        "rejected": "other",
    }

    chosen: Turns
    rejected: Turns

    @classmethod
    def title_of(cls, record: Record) -> str:
        is_own = "chosen" in record or "rejected" in record
        return cls.title if is_own else cls.openai_title

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Read two different answers to one prompt; the prompt may be the common beginning."""
        if cls.title_of(record) == cls.title:
            if missing := [key for key in ("chosen", "rejected") if key not in record]:
                raise RowRefused(
                    "preference.missing",
                    f'"{missing[0]}" is missing; a preference has a chosen and a rejected answer.',
                    f'Add "{missing[0]}", or rename the other key to "completion".',
                )
            prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        else:
            prompt, chosen, rejected = _openai_sides(record, cls.openai_keys)
        sides = (
            read_turns(chosen, "chosen", "assistant", fields),
            read_turns(rejected, "rejected", "assistant", fields),
        )
        # Some data sets repeat the whole conversation in both answers, as Anthropic's hh-rlhf does.
        whole = [side[0].role != "assistant" for side in sides]
        given = None if prompt is None else read_prompt(prompt, fields)
        if any(whole) or given is None:
            common = _common_beginning(*sides)
            if not common or not all(whole):
                raise RowRefused(
                    "preference.no_beginning",
                    "the row has no prompt, and chosen and rejected have no common beginning.",
                    "Add the prompt, or begin both conversations with the same messages.",
                )
            if given is not None and given not in (
                common[: len(given)],
                common[1 : len(given) + 1],
            ):
                raise RowRefused(
                    "preference.no_beginning",
                    "the prompt is not the beginning of both conversations.",
                    "Remove the prompt, or write only the answers as chosen and rejected.",
                )
            given, sides = common, (sides[0][len(common) :], sides[1][len(common) :])
        # Without blanks at the ends: a preference for a final line break teaches nothing else.
        if _strip(sides[0]) == _strip(sides[1]):
            raise RowRefused(
                "preference.equal",
                "chosen and rejected are equal.",
                "Fix or remove the row.",
            )
        _check_scores(record, fields)
        for side in sides:
            check_turn_order((*given, *side))
        # A rejected reply may be empty: a model said nothing, and people preferred something.
        check_not_blank((*given, *sides[0], *sides[1][:-1]))
        asked = record.get("input")
        tools = fields.tools(record) or fields.tools(asked if isinstance(asked, dict) else {})
        return cls(fields.file, fields.line, given, *sides, tools=tools)

    def answers(self) -> tuple[Turns, ...]:
        return (self.chosen, self.rejected)

    def record(self) -> Record:
        return {
            **tool_record(self.tools),
            "prompt": _short(self.messages, "user"),
            "chosen": _short(self.chosen, "assistant"),
            "rejected": _short(self.rejected, "assistant"),
        }


def _check_scores(record: Record, fields: FieldChecker) -> None:
    """Warn about a chosen answer with a lower score than the rejected answer, as in
    UltraFeedback."""
    chosen, rejected = (record.get(f"score_{side}") for side in ("chosen", "rejected"))
    if isinstance(chosen, int | float) and isinstance(rejected, int | float) and chosen < rejected:
        message = (
            f"the chosen answer has the score {chosen:g}, and the rejected answer {rejected:g}."
        )
        fix = "Swap both answers, or remove the row."
        where = Location(fields.file, fields.line)
        fields.warnings.append(Problem("preference.scores", message, fix, where))


def _openai_sides(record: Record, keys: Sequence[str]) -> tuple[object, object, object]:
    """Return prompt, chosen and rejected answer of OpenAI's form."""
    if missing := [key for key in keys if key not in record]:
        raise RowRefused(
            "preference.missing", f'"{missing[0]}" is missing.', f'Add "{missing[0]}".'
        )
    prompt, chosen, rejected = (record[key] for key in keys)
    if not isinstance(prompt, dict) or "messages" not in prompt:
        raise RowRefused(
            "preference.type",
            f'"input" must be an object with "messages", but is {json_kind(prompt)}.',
            'Write "input": {"messages": [{"role": "user", "content": "..."}]}.',
        )
    return prompt["messages"], chosen, rejected


def _common_beginning(one: Turns, other: Turns) -> Turns:
    """Return the common messages, up to the last position before an assistant turn in both."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    # Both answers must start with a reply; a common reply belongs to the prompt only with the
    # user's next turn.
    while count and not (one[count].role == other[count].role == "assistant"):
        count -= 1
    return one[:count]


def _strip(turns: Turns) -> list[tuple[str, str, str]]:
    return [(turn.role, turn.content.strip(), turn.reasoning) for turn in turns]


def _short(turns: Turns, role: str) -> object:
    """Return the turns in the shortest notation: a single turn of ``role`` becomes its text."""
    written = [turn.to_row() for turn in turns]
    plain = {"role": role, "content": turns[0].content}
    return turns[0].content if written == [plain] else written


@dataclass(frozen=True, slots=True)
class RankedReplies(JudgedAnswers):
    """Ranked answers to a prompt, the best first."""

    shape: ClassVar[str] = "ranking"
    title: ClassVar[str] = '{"prompt", "ranked"}'
    noun: ClassVar[str] = "ranked answers"
    keys: ClassVar[tuple[str, ...]] = ("ranked",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "ranked")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("ranked",))
    object_keys: ClassVar[frozenset[str]] = frozenset(("prompt", "ranked"))
    parts: ClassVar[Mapping[str, Part]] = {"messages": "input"}

    ranked: tuple[Turns, ...]

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Read two or more different answers; all but the best may be empty."""
        ranked = record["ranked"]
        if "prompt" not in record:
            raise RowRefused("preference.missing", '"prompt" is missing.', 'Add "prompt".')
        if not isinstance(ranked, list) or len(ranked) < 2:
            what = "has fewer" if isinstance(ranked, list) else f"is {json_kind(ranked)}"
            raise RowRefused(
                "preference.type",
                f'"ranked" must be an array of two answers at least, but {what}.',
                'Write "ranked": ["the best", "...", "the worst"].',
            )
        prompt = read_prompt(record["prompt"], fields)
        if len(ranked) > MOST_ANSWERS:
            raise RowRefused(
                "preference.type",
                f"the row has {len(ranked)} answers; the limit is {MOST_ANSWERS}.",
                "Remove some answers.",
            )
        answers = tuple(read_turns(each, "ranked", "assistant", fields) for each in ranked)
        if len({tuple(_strip(answer)) for answer in answers}) < len(answers):
            raise RowRefused(
                "preference.equal", "two ranked answers are equal.", "Remove one of both."
            )
        for answer in answers:
            check_turn_order((*prompt, *answer))
        best, *others = answers
        check_not_blank((*prompt, *best, *(turn for other in others for turn in other[:-1])))
        return cls(fields.file, fields.line, prompt, answers, tools=fields.tools(record))

    def texts(self) -> Iterator[Text]:
        yield from JudgedAnswers.texts(self)
        for place, answer in enumerate(self.ranked, 1):
            part: Part = "target" if place == 1 else "other"
            for number, turn in enumerate(answer, 1):
                yield from turn.texts(f"ranked[{place}][{number}]", part)

    def edit_texts(self, change: Callable[[str, str], str]) -> Self:
        answers = tuple(
            tuple(
                turn.edit_texts(f"ranked[{place}][{number}]", change)
                for number, turn in enumerate(answer, 1)
            )
            for place, answer in enumerate(self.ranked, 1)
        )
        return replace(JudgedAnswers.edit_texts(self, change), ranked=answers)

    def answers(self) -> tuple[Turns, ...]:
        return self.ranked

    def judgement(self) -> tuple[str, ...]:
        return tuple(turn.whole_text for answer in self.ranked for turn in answer)

    def record(self) -> Record:
        return {
            **tool_record(self.tools),
            "prompt": _short(self.messages, "user"),
            "ranked": [_short(answer, "assistant") for answer in self.ranked],
        }


@dataclass(frozen=True, slots=True)
class JudgedReply(JudgedAnswers):
    """Base of shapes with a single judged answer."""

    keys: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Part]] = {"messages": "input", "reply": "target"}

    reply: Turns

    @property
    def score(self) -> float:
        """Score of the answer; higher is better."""
        raise NotImplementedError

    @staticmethod
    def read_reply(
        record: Record, fields: FieldChecker, may_be_empty: bool = False
    ) -> tuple[Turns, Turns]:
        """Return prompt and answer of a record; ``may_be_empty`` allows an empty last turn."""
        prompt = read_prompt(record["prompt"], fields)
        reply = read_turns(record["completion"], "completion", "assistant", fields)
        check_turn_order((*prompt, *reply))
        check_not_blank((*prompt, *(reply[:-1] if may_be_empty else reply)))
        return prompt, reply

    def answers(self) -> tuple[Turns, ...]:
        return (self.reply,)

    def targets(self) -> tuple[str, ...]:
        """Return the answer and the judgement."""
        return (*(turn.whole_text for turn in self.reply), *self.judgement())

    def record(self) -> Record:
        return {
            **tool_record(self.tools),
            "prompt": _short(self.messages, "user"),
            "completion": _short(self.reply, "assistant"),
        }


@dataclass(frozen=True, slots=True)
class RatedReply(JudgedReply):
    """An answer to a prompt with a rating."""

    shape: ClassVar[str] = "rated"
    title: ClassVar[str] = '{"prompt", "completion", "rating"}'
    noun: ClassVar[str] = "answers with a rating"
    optional_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "input", "completion", "rating", "score")
    )
    beside: ClassVar[frozenset[str]] = frozenset(("rating", "score"))

    rating: float

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a row has a rating; other text, and null, is a remark and no rating."""
        return "prompt" in record and "completion" in record and _rating_in(record) is not None

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        prompt, reply = cls.read_reply(record, fields)
        rating = read_rating(_rating_in(record))
        tools = fields.tools(record)
        return cls(fields.file, fields.line, prompt, reply, rating, tools=tools)

    @property
    def score(self) -> float:
        return self.rating

    def judgement(self) -> tuple[str, ...]:
        return (repr(self.rating),)

    def record(self) -> Record:
        return {**JudgedReply.record(self), "rating": self.rating}


def _rating_in(record: Record) -> object:
    """Return a rating, or a text that looks like a number; ``None`` for any other value."""
    for key in ("rating", "score"):
        value = record.get(key)
        # Exact types, because True is an int in Python.
        if type(value) is int or type(value) is float:
            return value
        # Read here to be refused with a fix: as a remark, the row would be learned without its
        # rating.
        if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()):
            return value
    return None


@dataclass(frozen=True, slots=True)
class ThumbedReply(JudgedReply):
    """An answer to a prompt with a thumb up or down."""

    shape: ClassVar[str] = "thumb"
    title: ClassVar[str] = '{"prompt", "completion", "label": true}'
    noun: ClassVar[str] = "answers with a thumb"
    optional_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "input", "completion", *THUMB_KEYS)
    )
    beside: ClassVar[frozenset[str]] = frozenset(THUMB_KEYS)

    desirable: bool

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has a thumb; another label is a remark."""
        if "messages" not in record and not {"prompt", "completion"} <= record.keys():
            return False
        return "thumb" in record or any(thumb_of(record.get(key)) is not None for key in THUMB_KEYS)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Read an answer with a thumb; an answer with thumb down may be empty, like a rejected
        answer."""
        thumbs = (thumb_of(record.get(key)) for key in THUMB_KEYS)
        thumb = next((each for each in thumbs if each is not None), None)
        if thumb is None:
            value = next(record[key] for key in THUMB_KEYS if key in record)
            cls.read_reply(record, fields, may_be_empty=True)  # reports problems of the text first
            given = quote(value) if isinstance(value, str) else json_kind(value)
            raise RowRefused(
                "thumb.type",
                f"the thumb is {given}, not up or down.",
                'Write "label": true or false, or "thumb": "up" or "down". If the column is no thumb, '
                "use `--ignore label`.",
            )
        prompt, reply = cls.read_reply(record, fields, may_be_empty=not thumb)
        tools = fields.tools(record)
        return cls(fields.file, fields.line, prompt, reply, thumb, tools=tools)

    @property
    def score(self) -> float:
        return float(self.desirable)

    def judgement(self) -> tuple[str, ...]:
        return (repr(self.desirable),)

    def classes(self) -> tuple[str, ...]:
        return (str(self.desirable),)

    def record(self) -> Record:
        return {**JudgedReply.record(self), "label": self.desirable}


def thumb_of(value: object) -> bool | None:
    """Return a thumb as a boolean; ``None`` for a value that is none."""
    word = THUMBS.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    return truth_of(value) if word is None else word


def pair_answers(rows: Sequence[Row]) -> Sequence[Preference]:
    """Convert judged answers to pairs. Pairs stay unchanged; a ranking becomes all its pairs.

    Any two answers to one prompt with different ratings form a pair (Ouyang et al. 2022, section
    3.5); a thumb is a rating of 1 or 0. A pair has the location of the better answer.

    Raises:
        DataError: for answers without a comparison.
    """
    groups: dict[Turns, list[JudgedReply]] = {}
    for row in rows:
        if isinstance(row, JudgedReply):
            groups.setdefault(row.messages, []).append(row)
    problems = [problem for group in groups.values() if (problem := _incomparable(group))]
    if problems:
        raise DataError(problems)
    # On disk if large: the pairs of n answers to one prompt grow with the square of n.
    pairs = spool(_pairs(rows, groups))
    problems = [
        Problem(
            "preference.equal",
            "the same answer to the same prompt has another judgement in another row.",
            "Remove one of the rows.",
            pair.location,
        )
        for pair in pairs
        if pair.chosen == pair.rejected
    ]
    if problems:
        raise DataError(problems)
    return pairs


def _pairs(
    rows: Iterable[Row], groups: Mapping[Turns, Sequence[JudgedReply]]
) -> Iterator[Preference]:
    """Yield a pair of each better answer and each worse answer; ``groups`` has single answers by
    prompt."""
    for row in rows:
        if not isinstance(row, JudgedAnswers):
            continue
        sides = list(combinations(row.answers(), 2))
        if isinstance(row, JudgedReply):
            group = groups[row.messages]
            # Only worse answers, so each pair occurs once, at the better answer.
            sides = [(row.reply, other.reply) for other in group if other.score < row.score]
        for better, worse in sides:
            yield Preference(row.file, row.line, row.messages, better, worse, tools=row.tools)


def _incomparable(group: Sequence[JudgedReply]) -> Problem | None:
    first = group[0]
    if any(other.score != first.score for other in group):
        return None
    if len(group) == 1:
        return Problem(
            "rating.single",
            "the prompt has no other answer to compare with.",
            "Add an answer with another rating, remove the row, or use objective kto (thumbs) or sft.",
            first.location,
        )
    return Problem(
        "rating.tied",
        f"all {len(group)} answers to this prompt have the same rating ({first.score:g}).",
        "Rate one answer differently, or remove the rows.",
        first.location,
    )
