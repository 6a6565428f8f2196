"""Constrained decoding: replies that match a JSON schema, regular expression or grammar.

llguidance compiles the constraints to grammars and limits time and memory for most grammars.
:func:`check_schema` rejects schemas with unlimited cost.
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

from luthier.data.conversations.call_formats import ARGUMENTS, NAME
from luthier.data.conversations.tokenization import tokenizer_errors
from luthier.errors import RecipeError
from luthier.graders.json_schema import depth_of
from luthier.graders.regex import UNROLLED_CHARACTERS, unrolled_size
from luthier.inference.inference import InferenceFailed, InferenceRefused
from luthier.limits import SCHEMA_CHARACTERS
from luthier.types import Tool

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.conversations.reasoning import ReasoningFormat
    from luthier.models.decoding.sampling import Constraint

DEPTH = 100
"""Maximum nesting of a schema, because recursive functions read schemas."""
INTERSECTIONS = 8
"""Maximum number of patterns for one string: each pattern doubles the time of llguidance."""
MULTIPLE = 10_000
"""Largest least common multiple of all ``multipleOf``: the lexer has about as many states."""
STACK_BYTES = 256 << 20
"""Stack size of the thread that reads a grammar, because llguidance recurses over rules. Schemas of
200,000 characters needed less than 64 MiB, more than the usual 8 MiB."""
LEXER_FUEL = 100_000
"""Most nodes of a grammar's regular expressions: 5,000 choices, or 2,000 fields."""
LEXER_STATES = 100_000
"""Most states of a grammar's lexer, about 360 bytes each. Text of limited length needs 18 for each
token, text of any length few, ``\\w*a\\w{60}`` 200."""
ROW_ITEMS, STEP_ITEMS = 500, 5000
"""Maximum parser items per position and per token. An ambiguous grammar has an item for each rule
and start position: with the defaults of llguidance (2,000 and 50,000), 167 tokens of ``s: s s s |
"a" |`` take a minute; with these limits 0.4 s."""
_FORM: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space as ``json.dumps`` writes, so that a model cannot fill a reply with line breaks."""
_NOUNS = {"schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}
_EMBEDDED = re.compile(r"%json\s*")
_QUOTED = re.compile(r"\n +\d+ \| ")


class Matcher:
    """Grammar state of a reply."""

    def __init__(self, matcher: Any, noun: str) -> None:
        self._matcher, self._noun = matcher, noun

    def copy(self) -> Matcher:
        """Return a matcher with the same state."""
        return Matcher(self._matcher.deep_copy(), self._noun)

    @property
    def is_finished(self) -> bool:
        """True if the grammar allows only the end."""
        return bool(self._matcher.is_stopped())

    def allowed_mask(self, vocabulary: int) -> Tensor:
        """Return a boolean mask ``[V]`` of the allowed next tokens."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        # The head may have more rows than the tokenizer has ids; these rows are never allowed.
        allowed = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        return torch.from_numpy(np.pad(allowed, (0, vocabulary - len(allowed))))

    def accept_token(self, token: int) -> None:
        """Advance by ``token``."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(str(self._matcher.get_error()))
            text = f"The reply cannot match the {self._noun}: {reason}"
            raise InferenceFailed("Validation", text)


def check_constraint(constraint: Constraint, characters: int) -> None:
    """Raise :class:`InferenceRefused` for an invalid or too large constraint."""
    library = _library()
    grammar = _grammar_of(constraint, characters)
    # A byte vocabulary is enough for the check, so that no model is loaded.
    _read_grammar(library.LLTokenizer("byte"), grammar, constraint.kind)


def _read_grammar(tokenizer: Any, grammar: str, kind: str) -> Any:
    """Return llguidance's matcher of ``grammar``; ``kind`` is the request field.

    Raises:
        InferenceRefused: for an unenforceable grammar.
    """
    library = _library()
    items = {"max_items_in_row": ROW_ITEMS, "step_max_items": STEP_ITEMS}
    limits = library.LLParserLimits(
        max_lexer_states=LEXER_STATES,
        initial_lexer_fuel=LEXER_FUEL,
        **(items if kind == "grammar" else {}),
    )

    def read() -> tuple[Any, str]:
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        if not matcher.is_error():
            first.compute_bitmask()  # fails for a grammar that nothing matches
        return matcher, first.get_error() if first.is_error() else ""

    # Only reading recurses over the rules: the matcher is safe in threads with the usual stack.
    matcher, error = _with_deep_stack(read)
    if error:
        raise InferenceRefused(f"The {_NOUNS[kind]} cannot be enforced: {_reason(error)}", kind)
    return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        text = "Constrained decoding needs llguidance: pip install 'luthier[server]'"
        raise RecipeError(text) from None
    return llguidance


_starting = threading.Lock()


def _with_deep_stack(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread with a stack of :data:`STACK_BYTES` and return the result."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            # A panic in Rust is no Exception, and without a result the caller would wait forever.
            result.set_exception(error)

    with _starting:  # the size applies to all threads that start
        previous = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True).start()
        finally:
            threading.stack_size(previous)
    return result.result()


class Constraints:
    """Grammars for a model's vocabulary. Safe to share between threads."""

    def __init__(
        self, chat: ChatFormat, vocabulary: int, characters: int = SCHEMA_CHARACTERS
    ) -> None:
        """Accept schemas and grammars of at most ``characters``."""
        self._chat, self._vocabulary, self._characters = chat, vocabulary, characters
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint, reasoning: ReasoningFormat | None = None) -> Matcher:
        """Return a matcher of ``constraint`` after optional ``reasoning``.

        Raises:
            InferenceRefused: for an invalid or too large constraint.
        """
        grammar = _grammar_of(constraint, self._characters)
        channel = reasoning.marks.answer[0] if reasoning and reasoning.marks.answer else ""
        return self._matcher(grammar, constraint.kind, reasoning, channel)

    def calls(
        self, tools: Sequence[Tool], form: str, reasoning: ReasoningFormat | None = None
    ) -> Matcher:
        """Return a matcher of a single tool call after optional ``reasoning``.

        ``form`` is that of :func:`luthier.data.conversations.call_formats.call_form`.

        Raises:
            InferenceRefused: as :meth:`matcher`.
        """
        lines, left = [], self._characters
        for number, tool in enumerate(tools):
            check_schema(tool.parameters)
            schema = _serialize({**tool.parameters, "x-guidance": _FORM}, left)
            left -= len(schema)
            before, after = form.replace(NAME, tool.name).split(ARGUMENTS)
            parts = f"{self._literal(before)} arguments_{number} {self._literal(after)}"
            lines += [f"call_{number}: {parts}", f"arguments_{number}: %json {schema}"]
        choice = " | ".join(f"call_{number}" for number in range(len(tools)))
        return self._matcher(
            _named_lark("\n".join([f"start: {choice}", *lines])), "schema", reasoning
        )

    def _literal(self, text: str) -> str:
        """Return ``text`` as terminals of a grammar: added tokens by id, other text in quotes."""
        # llguidance gives added tokens no text.
        added = self._chat.tokenizer.added_tokens_decoder
        ids = {str(token): id_ for id_, token in added.items()}
        names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if names else [text]
        return " ".join(
            f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, or the name of a special token."""
        with self._lock:
            try:
                tokenizer = self._tokens()
            except InferenceRefused:  # a tokenizer in Python
                return self._chat.pieces([token])[0].encode()
        content: bytes = tokenizer.decode_bytes([token])
        return content

    def _matcher(
        self,
        grammar: str,
        kind: str = "schema",
        reasoning: ReasoningFormat | None = None,
        channel: str = "",
    ) -> Matcher:
        with self._lock:
            tokenizer = self._tokens()
        if reasoning is not None:
            grammar = self._behind_reasoning(grammar, reasoning, channel)
        # Not cached: copies share lexer states, about 5 kB a token, until the last copy is freed.
        # Compiling again takes 2 to 40 ms.
        return Matcher(_read_grammar(tokenizer, grammar, kind), _NOUNS[kind])

    def _behind_reasoning(self, grammar: str, reasoning: ReasoningFormat, channel: str) -> str:
        """Return ``grammar`` after reasoning and ``channel``. Reasoning is any text up to the closing
        mark.

        Reasoning is optional unless the prompt has the opening mark. Marks are special tokens, or plain
        text for a model without such tokens.
        """
        marks = reasoning.marks
        opening, close = self._literal(marks.open), json.dumps(marks.close)
        if marks.close_id is None:
            thought = f"thought[suffix={close}]: /(?s:.*)/"
            thoughts = "thought"
        else:
            letters = re.escape(marks.close).replace("/", "\\/")
            # The thought must not spell the closing mark in ordinary tokens.
            thought = f"THOUGHT: /(?s:.+)/ & ~/(?s:.*){letters}(?s:.*)/"
            thoughts = f"THOUGHT? <[{marks.close_id}]>"
        # gpt-oss opens a new turn after the reasoning.
        turn = marks.answer[-1].removesuffix(marks.answer[0]) if marks.answer else ""
        thoughts += f' "\\n"~0..2 {self._literal(turn)}'
        begin = f"({opening})? {thoughts}" if reasoning.is_open else f"({opening} {thoughts})?"
        start = f"{begin} {self._literal(channel)} @answer"
        (answer,) = json.loads(grammar)["grammars"]
        around = {"lark_grammar": f"start: {start}\n{thought}\n"}
        return json.dumps({"grammars": [around, {**answer, "name": "answer"}]}, ensure_ascii=False)

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            try:
                with tokenizer_errors():
                    self._tokenizer = self._chat.text_tokenizer.grammar_tokens(self._vocabulary)
            except (ValueError, RecipeError) as error:
                raise InferenceRefused(
                    f"This model does not support constrained decoding: {error}", "schema"
                ) from error
        return self._tokenizer


def _grammar_of(constraint: Constraint, characters: int) -> str:
    """Return the llguidance grammar of ``constraint``, a definition of at most ``characters``."""
    library = _library()
    kind, text = constraint.kind, constraint.definition
    if kind == "schema":
        return _schema_grammar(text, characters)
    if not isinstance(text, str) or not text:
        raise InferenceRefused(f"The {_NOUNS[kind]} must be non-empty text.", kind)
    if len(text) > characters:
        raise InferenceRefused(f"The {_NOUNS[kind]} has more than {characters:,} characters.", kind)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InferenceRefused(
            f"The {_NOUNS[kind]} is not valid text: {error.reason}.", kind
        ) from error
    _check_repeats(text, kind)
    if kind == "regex":
        grammar: str = library.LLMatcher.grammar_from_regex(text)
        return grammar
    # A schema inside a grammar has the same unlimited costs as a bare schema.
    for embedded in _EMBEDDED.finditer(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, embedded.end())
        except (ValueError, RecursionError) as error:
            raise InferenceRefused(f"The JSON after %json is invalid: {error}", kind) from error
        check_schema(value, kind)
    return _named_lark(text)


def _named_lark(text: str) -> str:
    # Wrapped, because llguidance would parse JSON text as a grammar in its own format.
    return json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False)


def _schema_grammar(schema: Any, characters: int) -> str:
    """Return the grammar of ``schema``; ``True`` stands for any object."""
    library = _library()
    if isinstance(schema, bool):
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise InferenceRefused("A JSON schema must be an object.", "schema")
    check_schema(schema)
    text = _serialize(schema, characters)
    try:
        grammar: str = library.LLMatcher.grammar_from_json_schema(text, None, _FORM)
    except ValueError as error:
        raise _unreadable(error) from error
    return grammar


def _serialize(schema: Mapping[str, Any], characters: int) -> str:
    pieces, size = [], 0
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
    try:
        # In pieces, so that other threads run and a long schema stops at the limit.
        for piece in encoder.iterencode(dict(schema)):
            pieces.append(piece)
            size += len(piece)
            if size > characters:
                text = f"The schema has more than {characters:,} characters."
                raise InferenceRefused(text, "schema")
        return "".join(pieces).encode().decode()  # refuses lone surrogates
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(error) from error


def check_depth(schema: Any, kind: str = "schema") -> None:
    """Raise :class:`InferenceRefused` for a schema deeper than :data:`DEPTH`."""
    if depth_of(schema) > DEPTH:
        raise InferenceRefused(f"The JSON schema is nested deeper than {DEPTH} levels.", kind)


def check_schema(schema: Any, kind: str = "schema") -> None:
    """Raise :class:`InferenceRefused` for a too costly schema in the field ``kind``."""
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
            # Through text: the binary number for 0.1 is a fraction with a denominator of 2^55.
            exact = Fraction(step if isinstance(step, int) else str(step))
            numerator = math.lcm(numerator, exact.numerator)
            denominator = math.lcm(denominator, exact.denominator)
            if numerator * denominator > MULTIPLE:
                text = (
                    "The JSON schema cannot be enforced: the least common multiple of all "
                    f"`multipleOf` exceeds {MULTIPLE:,}. Simplify the schema."
                )
                raise InferenceRefused(text, kind)
    if min(patterns, joined) > INTERSECTIONS:
        text = (
            f"The JSON schema cannot be enforced: `allOf` or `$ref` join more than {INTERSECTIONS} "
            "patterns. Simplify the schema."
        )
        raise InferenceRefused(text, kind)


def _check_repeats(pattern: str, kind: str) -> None:
    """Refuse large counted repeats: llguidance needs 165 MiB for a million characters."""
    limit = max(UNROLLED_CHARACTERS, len(pattern))
    if unrolled_size(pattern) > limit:
        text = (
            f"The {_NOUNS[kind]} cannot be enforced: counts in braces repeat more than {limit:,} "
            "characters. Lower the counts, or use * or +."
        )
        raise InferenceRefused(text, kind)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _unreadable(error: Exception) -> InferenceRefused:
    return InferenceRefused(f"The JSON schema is invalid: {_reason(str(error))}", "schema")


def _reason(error: str) -> str:
    """Return an error message of llguidance without the grammar and the parser state."""
    text = error.partition("<state>")[0]
    if "NoExtensionBias" in text:
        return "no text can match, or references form a circle."
    if "regex parse error" in text:
        text = f"invalid regular expression: {text.rpartition('error:')[2]}"
    return " ".join(_QUOTED.split(text)[0].split())[:300]
