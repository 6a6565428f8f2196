"""Constrained decoding: the tokens that may follow in answers of a JSON schema, regex or grammar.

All three become a grammar of the library llguidance, which bounds the work to read most grammars
and to find the tokens that may follow. :func:`check_schema` refuses the schemas that it does not
bound.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.tokenization import panics_refused
from luthier.errors import RecipeError
from luthier.graders.json_schema import VALUES, depth_of
from luthier.graders.regex import UNROLLED_CHARACTERS, unrolled_size
from luthier.inference.inference import InferenceFailed, InferenceRefused
from luthier.limits import SCHEMA_CHARACTERS
from luthier.types import CALL_CLOSE, CALL_OPEN, Tool

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.data.reasoning import ReasoningFormat
    from luthier.models.sampling import Constraint

_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords whose schemas stand under names."""
DEPTH = 100
"""Levels of objects and lists in a schema: it is read by functions that call themselves."""
INTERSECTIONS = 8
"""Patterns of a schema that one text may have to match: the library's time doubles with each."""
MULTIPLE = 10_000
"""Least common multiple of all ``multipleOf`` of a schema: the lexer has about as many states."""
STACK_BYTES = 256 << 20
"""Stack of a thread that reads a grammar: the library calls itself for each rule that names a rule.
Schemas of 200,000 characters took less than 64 MiB; the 8 MiB of other threads overflow."""
LEXER_FUEL = 100_000
"""Nodes of a grammar's regular expressions: 5,000 texts to choose from, or 2,000 fields."""
LEXER_STATES = 100_000
"""States of a grammar's lexer, some 360 bytes each, that an answer may lead to. A text of limited
length has 18 for each token, one of any length few, ``\\w*a\\w{60}`` 200."""
ROW_ITEMS, STEP_ITEMS = 500, 5000
"""Of the parser, in one place of a grammar's text and for one token. Each rule that may have begun
at each place before is an item of an ambiguous grammar: of ``s: s s s | "a" |`` the library's own
limits (2,000 and 50,000) let 167 tokens take a minute, and these 0.4 s."""
_FORM: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space as Python writes it, and no other: a model cannot fill an answer with line breaks."""


_NOUNS = {"schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}
"""What the fields of a request are called."""
_NO_PATTERN = "a pattern is no regular expression: "
_LINE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
"""Where in a grammar in Lark something is wrong."""
_JSON = re.compile(r"%json\s*")
_QUOTED = re.compile(r"\n +\d+ \| ")
_PATTERN = re.compile(
    r"regex parse error:\n {4}(?P<quoted>[^\n]*)\n {4}(?P<before> *)\^+\nerror: (?P<reason>[^\n]*)"
)


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, noun: str) -> None:
        self._matcher, self._noun = matcher, noun

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), self._noun)

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed_mask(self, vocabulary: int) -> Tensor:
        """Which tokens may come next, booleans ``[V]``."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        return torch.from_numpy(np.pad(allowed, (0, vocabulary - len(allowed))))

    def take(self, token: int) -> None:
        """Go on behind ``token``."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _plain(str(self._matcher.get_error()))
            raise InferenceFailed(
                "Validation", f"The answer cannot be kept to its {self._noun}: {reason}"
            )


def check_constraint(constraint: Constraint, characters: int) -> None:
    """Refuse a constraint that answers of no model can match, or of more than ``characters``.

    Raises:
        InferenceRefused: with the reason.
    """
    library = _library()
    grammar = _grammar_of(constraint, characters)
    _read_grammar(library.LLTokenizer("byte"), grammar, constraint.kind)


def _read_grammar(tokenizer: Any, grammar: str, kind: str) -> Any:
    """Return a matcher of the library for ``grammar``, which the field ``kind`` gave.

    Raises:
        InferenceRefused: for a grammar that cannot be enforced.
    """
    library = _library()
    items = {"max_items_in_row": ROW_ITEMS, "step_max_items": STEP_ITEMS}
    limits = library.LLParserLimits(
        max_lexer_states=LEXER_STATES,
        initial_lexer_fuel=LEXER_FUEL,
        **(items if kind == "grammar" else {}),
    )

    def read() -> tuple[Any, str]:
        made = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        first = made.deep_copy()
        if not made.is_error():
            first.compute_bitmask()  # a grammar that nothing matches says so at the first token
        return made, first.get_error() if first.is_error() else ""

    made, error = _with_deep_stack(read)
    if error:
        raise InferenceRefused(_refusal(error, kind), kind)
    return made


def _library() -> Any:
    """Import llguidance.

    Raises:
        RecipeError: if llguidance is not installed.
    """
    try:
        import llguidance
    except ImportError:
        need = "schemas and grammars of answers need: pip install 'luthier[server]'"
        raise RecipeError(need) from None
    return llguidance


_starting = threading.Lock()


def _with_deep_stack(work: Callable[[], Any]) -> Any:
    """Return the result of ``work``, which runs in a thread of :data:`STACK_BYTES`."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    with _starting:  # the size is that of all threads that start meanwhile
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True).start()
        finally:
            threading.stack_size(before)
    return found.result()


class Constraints:
    """The grammars of one model's vocabulary. Safe to share between threads."""

    def __init__(
        self, chat: ChatFormat, vocabulary: int, characters: int = SCHEMA_CHARACTERS
    ) -> None:
        """Read schemas and grammars of at most ``characters``."""
        self._chat, self._vocabulary, self._characters = chat, vocabulary, characters
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint, reasoning: ReasoningFormat | None = None) -> Matcher:
        """A matcher for texts that meet ``constraint``, behind ``reasoning`` of any kind.

        Raises:
            InferenceRefused: where it is not well-formed, or has what cannot be enforced.
        """
        grammar = _grammar_of(constraint, self._characters)
        return self._matcher(grammar, constraint.kind, reasoning)

    def calls(
        self, tools: Sequence[Tool], marked: bool, reasoning: ReasoningFormat | None = None
    ) -> Matcher:
        """A matcher for one call of one of ``tools``; ``marked`` ones stand between tags.

        Before the call is what ``reasoning`` allows.

        Raises:
            InferenceRefused: as :meth:`matcher`.
        """
        for tool in tools:
            check_schema(tool.parameters)
        if len(tools) == 1:
            schema = _call(tools[0], "#")
        else:
            schema = {"anyOf": [_call(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]}
        if not marked:
            grammar = _schema_grammar(schema, self._characters)
            return self._matcher(grammar, reasoning=reasoning)
        body = _serialize({**schema, "x-guidance": _FORM}, self._characters)
        lark = f'start: "{CALL_OPEN}\\n" call "\\n{CALL_CLOSE}"\ncall: %json {body}\n'
        return self._matcher(_named_lark(lark), reasoning=reasoning)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; a special one, its name."""
        with self._lock:
            try:
                tokenizer = self._tokens()
            except InferenceRefused:  # written in Python, of whole characters
                return self._chat.pieces([token])[0].encode()
        found: bytes = tokenizer.decode_bytes([token])
        return found

    def _matcher(
        self, grammar: str, kind: str = "schema", reasoning: ReasoningFormat | None = None
    ) -> Matcher:
        with self._lock:
            tokenizer = self._tokens()
        if reasoning is not None:
            grammar = _behind_reasoning(grammar, reasoning)
        # None is kept for the next answer: copies share what they learn of texts, some 5 kB a token,
        # which only goes with the last of them. To compile it again takes 2 to 40 ms as a rule.
        return Matcher(_read_grammar(tokenizer, grammar, kind), _NOUNS[kind])

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            try:
                with panics_refused():
                    self._tokenizer = self._chat.grammar_tokens(self._vocabulary)
            except (ValueError, RecipeError) as error:
                raise InferenceRefused(
                    f"Answers of this model cannot be kept to a grammar: {error}", "schema"
                ) from error
        return self._tokenizer


def _grammar_of(constraint: Constraint, characters: int) -> str:
    """The grammar of texts that meet ``constraint``, which has at most so many ``characters``."""
    library = _library()
    kind, text = constraint.kind, constraint.definition
    if kind == "schema":
        return _schema_grammar(text, characters)
    if not isinstance(text, str) or not text:
        raise InferenceRefused(f"The {_NOUNS[kind]} is a text, and not empty.", kind)
    if len(text) > characters:
        raise InferenceRefused(f"The {_NOUNS[kind]} has more than {characters:,} characters.", kind)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InferenceRefused(f"The {_NOUNS[kind]} is no text: {error.reason}.", kind) from error
    _check_repeats(text, kind)
    if kind == "regex":
        grammar: str = library.LLMatcher.grammar_from_regex(text)
        return grammar
    for embedded in _JSON.finditer(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, embedded.end())
        except (ValueError, RecursionError) as error:
            raise InferenceRefused(
                f"The JSON behind %json cannot be read: {error}", kind
            ) from error
        check_schema(value, kind)
    return _named_lark(text)


def _named_lark(text: str) -> str:
    # Named, as a text of JSON would else be read as a grammar in the library's own form.
    return json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False)


def _behind_reasoning(grammar: str, reasoning: ReasoningFormat) -> str:
    """``grammar`` for what follows the reasoning, which may be any text up to its closing mark.

    Where the prompt has not begun it, an answer may do without. The marks are the tokens that they
    are; a model that writes them letter by letter has them as texts.
    """
    marks = reasoning.marks
    opening, close = json.dumps(marks.open), json.dumps(marks.close)
    if marks.open_id is not None:
        opening = f"<[{marks.open_id}]>"
    if marks.close_id is None:
        thought = f"thought[suffix={close}]: /(?s:.*)/"
        thoughts = "thought"
    else:
        letters = re.escape(marks.close).replace("/", "\\/")
        thought = f"THOUGHT: /(?s:.+)/ & ~/(?s:.*){letters}(?s:.*)/"
        thoughts = f"THOUGHT? <[{marks.close_id}]>"
    lines = r'"\n"~0..2'
    start = (
        f"{opening}? {thoughts} {lines} @answer"
        if reasoning.is_open
        else f"({opening} {thoughts} {lines})? @answer"
    )
    (answer,) = json.loads(grammar)["grammars"]
    around = {"lark_grammar": f"start: {start}\n{thought}\n"}
    return json.dumps({"grammars": [around, {**answer, "name": "answer"}]}, ensure_ascii=False)


def _schema_grammar(schema: Any, characters: int) -> str:
    """The grammar of JSON of ``schema``; of any object where it is ``True``."""
    library = _library()
    if isinstance(schema, bool):
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise InferenceRefused("A JSON schema is an object.", "schema")
    check_schema(schema)
    text = _serialize(schema, characters)
    try:
        grammar: str = library.LLMatcher.grammar_from_json_schema(text, None, _FORM)
    except ValueError as error:
        raise _unreadable(error) from error
    return grammar


def _serialize(schema: Mapping[str, Any], characters: int) -> str:
    """``schema`` as JSON, where it has at most so many ``characters``."""
    pieces, size = [], 0
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
    try:
        # Piece by piece, so that others run meanwhile, and a long one ends at the limit.
        for piece in encoder.iterencode(dict(schema)):
            pieces.append(piece)
            size += len(piece)
            if size > characters:
                text = f"The schema has more than {characters:,} characters."
                raise InferenceRefused(text, "schema")
        return "".join(pieces).encode().decode()  # halves of surrogate pairs are no text
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(error) from error


def check_depth(schema: Any, kind: str = "schema") -> None:
    """Refuse a schema that is nested too deeply to be read."""
    if depth_of(schema) > DEPTH:
        raise InferenceRefused(f"The JSON schema is nested deeper than {DEPTH} levels.", kind)


def check_schema(schema: Any, kind: str = "schema") -> None:
    """Refuse a schema, given in the field ``kind``, that would take too much time or memory to
    read.

    Raises:
        InferenceRefused: with the reason.
    """
    check_depth(schema, kind)
    numerator = denominator = 1
    patterns = joined = 0
    for each in _objects(schema):
        if isinstance(each.get("pattern"), str):
            _check_repeats(each["pattern"], kind)
        patterns += "pattern" in each
        joined += "pattern" in each and "$ref" in each
        joined += len(each["allOf"]) if isinstance(each.get("allOf"), list) else 0
        step = each.get("multipleOf")
        if isinstance(step, int | float) and math.isfinite(step):
            exact = Fraction(step if isinstance(step, int) else str(step))
            numerator = math.lcm(numerator, exact.numerator)
            denominator = math.lcm(denominator, exact.denominator)
            if numerator * denominator > MULTIPLE:
                text = (
                    "The JSON schema cannot be enforced: the least common multiple of its "
                    f"`multipleOf` is more than {MULTIPLE:,}. Use a simpler one."
                )
                raise InferenceRefused(text, kind)
    if min(patterns, joined) > INTERSECTIONS:
        text = (
            f"The JSON schema cannot be enforced: it joins more than {INTERSECTIONS} patterns by "
            "`allOf` or `$ref`. Use a simpler one."
        )
        raise InferenceRefused(text, kind)


def _check_repeats(pattern: str, kind: str) -> None:
    """Refuse counted repeats that stand for a long text: the library keeps 165 MiB for a
    million."""
    most = max(UNROLLED_CHARACTERS, len(pattern))
    if unrolled_size(pattern) > most:
        text = (
            f"The {_NOUNS[kind]} cannot be enforced: counts in braces repeat more than {most:,} "
            "characters. Lower the counts, or use * or +."
        )
        raise InferenceRefused(text, kind)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield each object of a JSON value, at any depth."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _unreadable(error: Exception) -> InferenceRefused:
    return InferenceRefused(f"The JSON schema cannot be read: {_plain(str(error))}", "schema")


def _refusal(error: str, kind: str) -> str:
    found, line = _plain(error), _LINE.match(error)
    if line and kind == "grammar":
        found = f"line {line[1]}, column {line[2]}: {found}"
        if "::=" in error:
            found += " Write it in Lark: this looks like GBNF."
    if kind == "regex":
        found = found.removeprefix(_NO_PATTERN)
    return f"The {_NOUNS[kind]} cannot be enforced: {found}"


def _plain(error: str) -> str:
    """What the library says, without its own grammar around it and the state of its parser."""
    said = _LINE.sub("", error.partition("<state>")[0])
    if said.strip() == "NoExtensionBias":
        return "nothing can match it, or its references go round in a circle."
    if pattern := _PATTERN.search(said):
        # It quotes the pattern, marks a place below, and says what is wrong at the end.
        return (
            f"{_NO_PATTERN}{' '.join(pattern['reason'].split())}, "
            f"at character {len(pattern['before']) + 1}: "
            f"{pattern['quoted'][len(pattern['before']) :][:40]}"
        )
    if "regex parse error" in said:
        said = f"{_NO_PATTERN}{said.rpartition('error:')[2]}"
    # Further lines quote the grammar.
    return " ".join(_QUOTED.split(said)[0].split())[:300]


def _call(tool: Tool, place: str) -> dict[str, Any]:
    """The schema of a call of ``tool``, where it stands at ``place`` of the whole one."""
    arguments = _move_references(dict(tool.parameters), f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _move_references(schema: Any, place: str, named: bool = False) -> Any:
    """``schema`` with its references to itself, after it was put at ``place`` of another one.

    Values that it allows stay as they are; in ``named`` schemas the keys are names, not keywords.
    """
    if isinstance(schema, list):
        return [_move_references(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if not named and key in VALUES:
            moved[key] = value
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value[:2] == "#/"):
            moved[key] = place + value[1:]
        else:
            moved[key] = _move_references(value, place, not named and key in _NAMED)
    return moved
