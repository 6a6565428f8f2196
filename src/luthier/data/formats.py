"""Row forms of other tools and their conversion to and from luthier's shapes.

``FORMS`` is the table of input forms: name, identifying keys, and a function that returns the
record in a shape of ``luthier.data.shapes``. Text is never altered. A blank line joins an Alpaca
instruction and its input, as in the Stanford Alpaca recipe but without the headings. ``TARGETS`` is
the table of output forms. A row that the target form cannot represent is rejected. To add a form,
write one function and one line of a table.

Not supported: several positives in one row. :mod:`luthier.data.files.nested` reads SQuAD's nested file.
``--map`` accepts tables that differ only in the column names.
``luthier.data.conversations.row_context`` joins system prompts, histories and tools to the turns,
for all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from luthier.data.character_spans import (
    Tagged,
    are_spans,
    is_label_studio,
    label_studio_spans,
    tag_words,
)
from luthier.data.conversations.row_context import TOOL_KEYS, context_keys, is_blank
from luthier.data.conversations.tool_forms import take_hermes_tools
from luthier.data.conversations.turn_marks import truth_of
from luthier.data.field_checks import ROLE_RENAMES, Names, Turns
from luthier.data.files.parsing import Record, parse_embedded
from luthier.data.inputs import media_kind
from luthier.data.shapes import SHAPES
from luthier.data.shapes.conversations import Conversation, PromptCompletion, tool_record
from luthier.data.shapes.media import CAPTION_KEYS
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.preferences import THUMB_KEYS, JudgedAnswers, Preference
from luthier.data.shapes.texts import NEGATIVE_KEYS, RawText
from luthier.errors import RowRefused
from luthier.types import Row

Converted = tuple[Record, Names]
TEXT_PAIRS = (
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
)
"""Names of two compared texts."""


@dataclass(frozen=True, slots=True)
class Form:
    """A row form of another tool."""

    name: str
    """Name for messages."""
    keys: frozenset[str]
    """Keys that identify the form."""
    convert: Callable[[Record], Converted]
    """Conversion to a luthier shape; may modify the argument."""
    without: frozenset[str] = frozenset()
    """Keys that exclude the form."""
    used: frozenset[str] = frozenset()
    """Optional keys that the form reads."""
    applies: Callable[[Record], bool] = lambda record: True
    """Additional check of the values, if the keys are ambiguous."""
    tag: Callable[[Record], Tagged] | None = None
    """Words and tags of a text with entities by characters. ``convert`` needs both in the record."""


_OWN = frozenset(key for kind in SHAPES.values() for key in kind.keys) - {"label", "rating"}
_JUDGED = frozenset(("label", "labels", "score", "rating", "similarity", "chosen", "rejected"))


def _asked_preference(name: str, question: str, *context: str, without: str = "") -> Form:
    """Return the form of a chosen and a rejected answer to a question under another key."""

    def convert(record: Record) -> Converted:
        below = [record[key] for key in context if not is_blank(record.get(key))]
        sides = {key: record[key] for key in ("chosen", "rejected")}
        converted = {"prompt": _above(record[question], below), **sides}
        return _with_further_keys(record, converted), {"prompt": question}

    excluded = frozenset(("prompt", "messages", *without.split()))
    keys = frozenset((question, "chosen", "rejected"))
    return Form(name, keys, convert, excluded, frozenset(context))


def _question_answer(
    name: str,
    question: str,
    answer: str,
    *context: str,
    without: str = "",
    applies: Callable[[Record], bool] = lambda record: True,
) -> Form:
    """Return the form of a question and an answer, with optional text below the question."""

    def convert(record: Record) -> Converted:
        below = [record[key] for key in context if not is_blank(record.get(key))]
        converted: Record = {"completion": record[answer]} if answer in record else {}
        if question in record:
            converted["prompt"] = _above(record[question], below)
        return _with_further_keys(record, converted), {"prompt": question, "completion": answer}

    keys, excluded = frozenset((question, answer)), frozenset(without.split())
    return Form(name, keys, convert, excluded, frozenset(context), applies)


_BESIDE_ANY = ("id", "expected", "rating", "score", *THUMB_KEYS)


def _only_item(value: object) -> object:
    """Return the item of an array of one item; any other value unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _above(text: object, below: list[object]) -> object:
    """Join texts with blank lines; return the first non-text value for a later error."""
    parts = [text, *below]
    # The check of fields reports the value with file and line; an error here would not know them.
    wrong = [part for part in parts if not isinstance(part, str)]
    return wrong[0] if wrong else "\n\n".join(map(str, parts))


def _with_further_keys(record: Record, converted: Record) -> Record:
    """Return ``converted`` with keys common to all forms: id, expected answer, judgement, context."""
    kept = context_keys(Conversation, {**record, **converted}) | {*_BESIDE_ANY}
    if "anchor" in converted:
        kept |= NEGATIVE_KEYS
    return converted | {key: record[key] for key in record if key in kept}


def _conversation(record: Record) -> Converted:
    """Convert a row of Bedrock's Converse API."""
    return _with_further_keys(record, {"messages": record.get("messages")}), {}


def _sharegpt(record: Record) -> Converted:
    turns = record.get("conversations")
    if isinstance(turns, list):
        turns, tools = take_hermes_tools([_turn(each) for each in turns])
        record = record if tools is None else {"tools": tools, **record}
    return _with_further_keys(record, {"messages": turns}), {
        "messages": "conversations",
        "role": "from",
        "content": "value",
    }


def _sharegpt_preference(record: Record) -> Converted:
    """Convert a preference of LLaMA-Factory: earlier turns and two turns to compare."""
    converted, names = _sharegpt(record)
    sides: Record = {key: _turn(record[key]) for key in ("chosen", "rejected")}
    names = {**names, "prompt": names["messages"]}
    return {**converted, "prompt": converted.pop("messages"), **sides}, names


def _turn(item: object) -> object:
    """Return a turn with ``role`` and ``content``; an invalid turn unchanged for a later error."""
    if not isinstance(item, dict) or "from" not in item:
        return item
    role = item["from"]
    standard_role = ROLE_RENAMES.get(role) if isinstance(role, str) else None
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    return {
        **rest,
        "role": standard_role or role,
        **({"content": item["value"]} if "value" in item else {}),
    }


def _xlam(record: Record) -> Converted:
    """Convert a row of xLAM: a query and the calls for the answer."""
    calls = record["answers"]
    if isinstance(calls, str):
        with suppress(ValueError):  # the check of the turns reports other text
            calls = parse_embedded(calls)
    reply = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [{"role": "user", "content": record["query"]}, reply]
    return _with_further_keys(record, {"messages": messages}), {"messages": "answers"}


def _image_reference(record: Record) -> Converted:
    """Convert a row of Bedrock image models: location and caption."""
    converted = {"image": record.get("image-ref")}
    converted |= {key: record[key] for key in ("caption",) if key in record}
    return _with_further_keys(record, converted), {"image": "image-ref"}


def _media_paths(name: str, key: str) -> Form:
    """Return the form with a media path under ``key`` and an optional caption or label."""

    def convert(record: Record) -> Converted:
        path = str(record[key])
        # `applies` has checked the ending.
        kind = media_kind(path) or "audio"
        annotations = {each: record[each] for each in CAPTION_KEYS if each in record}
        return _with_further_keys(record, {kind: path, **annotations}), {kind: key}

    def applies(record: Record) -> bool:
        return isinstance(record[key], str) and media_kind(str(record[key])) is not None

    other, used = frozenset(("image", "audio")), frozenset((*CAPTION_KEYS, "label", "rating"))
    return Form(name, frozenset((key,)), convert, other, used, applies)


def _multiple_choice(record: Record) -> Converted:
    """Convert a multiple-choice question, with the prompt of ARC and BoolQ (Gao et al. 2021,
    lm-evaluation-harness).

    COPA's ``relation`` replaces the word "Answer".
    """
    relation = record.get("relation")
    asks = {"cause": "Cause", "effect": "Effect"}.get(str(relation), "Answer")
    above = [record["context"]] if not is_blank(record.get("context")) else []
    texts = [*above, record["question"]]
    prompt: object = next((each for each in texts if not isinstance(each, str)), None)
    if prompt is None and not is_blank(record["question"]):
        prompt = "\n".join([*map(str, above), f"Question: {record['question']}", f"{asks}:"])
    converted = {"prompt": prompt, "choices": record["choices"], "answer": record["answer"]}
    return _with_further_keys(record, converted), {"prompt": "question"}


def _has_choices(record: Record) -> bool:
    # `answer` is also the text of a plain question and answer.
    return isinstance(record.get("choices"), list) and type(record.get("answer")) is int


_ANSWER_KEYS = ("text", "body", "content", "answer")
_ACCEPTED_KEYS = ("accepted", "is_accepted", "selected")
_VOTE_KEYS = ("votes", "score", "upvotes", "pm_score")


def _thread(question: str, *context: str) -> Form:
    """Return the form of a forum's question with its answers. The accepted answer becomes the
    reply, or else the answer with the most votes."""

    def convert(record: Record) -> Converted:
        if not _is_thread(record):  # a later row of the file
            raise RowRefused(
                "field.list",
                '"answers" has no answer with votes or the mark "accepted".',
                "Remove the row, or add its answers.",
            )
        below = [record[key] for key in context if not is_blank(record.get(key))]
        answers: Any = record["answers"]
        best = max(answers, key=_standing)
        key = next(key for key in _ANSWER_KEYS if key in best)
        converted = {"prompt": _above(record[question], below), "completion": best[key]}
        return _with_further_keys(record, converted), {"prompt": question, "completion": "answers"}

    keys = frozenset((question, "answers"))
    return Form("thread of a forum", keys, convert, used=frozenset(context), applies=_is_thread)


def _is_thread(record: Record) -> bool:
    answers = record["answers"]
    return isinstance(answers, list) and bool(answers) and all(map(_is_judged, answers))


def _is_judged(answer: object) -> bool:
    if not isinstance(answer, dict) or not answer.keys() & {*_ANSWER_KEYS}:
        return False
    return bool(answer.keys() & {*_ACCEPTED_KEYS, *_VOTE_KEYS})


def _standing(answer: Record) -> tuple[bool, float]:
    accepted = any(truth_of(answer.get(key)) is True for key in _ACCEPTED_KEYS)
    votes: Any = next((answer[key] for key in _VOTE_KEYS if key in answer), 0)
    return accepted, votes if isinstance(votes, int | float) else 0


def _options(record: Record) -> Converted:
    """Convert WinoGrande: a continuation for several beginnings, as in the published scoring."""
    options = record["options"]
    choices = [record["continuation"]] * (len(options) if isinstance(options, list) else 1)
    converted = {"prompt": options, "choices": choices, "answer": record["answer"]}
    return _with_further_keys(record, converted), {"prompt": "options", "choices": "continuation"}


def _pair(name: str, anchor: str, positive: str) -> Form:
    """Return the form of two related texts under other keys, with optional negatives."""
    return replace(_rename(name, anchor=anchor, positive=positive), used=NEGATIVE_KEYS)


def _labelled_pair(first: str, second: str) -> Form:
    """Return the form of two texts with a relevance, if the label is a number, or else a class."""

    def convert(record: Record) -> Converted:
        label: Any = record["label"]
        # A file is read in one pass, so each row must decide by itself: a number is a relevance, a
        # word other than yes and no a class.
        if isinstance(label, str) and (truth := truth_of(label)) is not None:
            label = int(truth)
        with suppress(TypeError, ValueError):
            float(label)
            converted = {"query": record[first], "document": record[second]}
            found = _with_further_keys(record, converted) | {"label": label}
            return found, {"query": first, "document": second}
        return _classified_pair(record, first, second)

    return Form("labelled pair of texts", frozenset((first, second, "label")), convert)


def _classified_pair(record: Record, first: str, second: str) -> Converted:
    """Convert two texts with a class to one text."""
    text = _above(record[first], [record[second]])
    return _with_further_keys(record, {"text": text, "label": record["label"]}), {"text": first}


def _item_list(record: Record) -> Converted:
    """Convert the items of a user: the last item is the one to predict."""
    if not _is_item_list(record):  # a later row of the file
        fix = "Remove the row, or add its items."
        raise RowRefused("field.list", '"items" must be an array of names or numbers.', fix)
    items: Any = record["items"]
    row_id = {key: record[key] for key in ("id",) if key in record}
    return {**row_id, "history": items[:-1], "item": items[-1]}, {"history": "items"}


def _is_item_list(record: Record) -> bool:
    items = record["items"]
    return isinstance(items, list) and bool(items) and all(type(i) in (str, int) for i in items)


ITEMS = Form(
    "items of a user",
    frozenset(("items",)),
    _item_list,
    _OWN,
    used=frozenset(("user",)),
    applies=_is_item_list,
)
"""Rows of users."""


def _flag_embedding(record: Record) -> Converted:
    """Convert a row of FlagEmbedding with an array of one positive."""
    converted = {"anchor": record["query"], "positive": _only_item(record["pos"])}
    return _with_further_keys(record, converted), {"anchor": "query", "positive": "pos"}


_OTHER_TARGETS = frozenset(
    ("tags", "label", "labels", "rating", "completion", "prompt", "messages", "choices")
)


def _entities(key: str, may_be_empty: bool) -> Form:
    """Return the form of a text with entities by characters under ``key``.

    Without ``may_be_empty``, an empty array is no mark of the form, but a text without labels.
    """

    def tag(record: Record) -> Tagged:
        # Label Studio's JSON-MIN leaves the key of a text without entities out.
        found: Any = record.get(key, [])
        if not are_spans(found):  # a later row of the file
            fix = f'Write "{key}": [[0, 4, "person"]], or [] without entities.'
            raise RowRefused("field.list", f'"{key}" is no array of entities.', fix)
        if record.get("answer") in ("reject", "ignore"):  # Prodigy
            message = f'The annotation is marked "{record["answer"]}".'
            raise RowRefused("tags.rejected", message, "Remove the row.")
        return tag_words(record["text"], found)

    return Form(
        "text with entities",
        frozenset(("text", key)),
        lambda record: (_take_tags(record), {"tokens": "text", "tags": key}),
        _OTHER_TARGETS - {key},
        frozenset(("text", "tokens", "answer")),
        lambda record: are_spans(record[key]) and (may_be_empty or bool(record[key])),
        tag,
    )


def _tag_label_studio(record: Record) -> Tagged:
    if not is_label_studio(record):  # a later row of the file
        fix = "Export the tasks again, or remove the row."
        raise RowRefused("field.list", "The row is no task of Label Studio.", fix)
    return tag_words(*label_studio_spans(record))


def _take_tags(record: Record) -> Record:
    return {key: record[key] for key in ("id", "tokens", "tags") if key in record}


def _rename(name: str, without: str = "", **names: str) -> Form:
    """Return the form of rows with other key names, given by luthier's keys."""

    def convert(record: Record) -> Converted:
        converted = {key: record[column] for key, column in names.items() if column in record}
        return _with_further_keys(record, converted), names

    return Form(name, frozenset(names.values()), convert, frozenset(without.split()))


def _form(
    name: str, keys: str, convert: Callable[[Record], Converted], without: str = "", used: str = ""
) -> Form:
    key_set, without_set, used_set = (frozenset(each.split()) for each in (keys, without, used))
    return Form(name, key_set, convert, without_set, used_set)


_ELSE = "instruction question query"
_NO_TEXT = " ".join(sorted(_OWN | _JUDGED))
FORMS: tuple[Form, ...] = (
    _form("Bedrock conversation", "schemaVersion messages", _conversation),
    _form("ShareGPT", "conversations", _sharegpt, without="chosen rejected"),
    _form("ShareGPT preference", "conversations chosen rejected", _sharegpt_preference),
    _asked_preference("question with preference", "question"),
    _asked_preference("instruction with preference", "instruction", "input"),
    _asked_preference("query with preference", "query"),
    _asked_preference("input with preference", "input", without=_ELSE),
    _form("xLAM", "query answers tools", _xlam),
    _question_answer("Alpaca", "instruction", "output", "input"),
    _question_answer("instruction and response", "instruction", "response", "context", "input"),
    Form(
        "question with choices",
        frozenset(("question", "choices", "answer")),
        _multiple_choice,
        used=frozenset(("context", "relation")),
        applies=_has_choices,
    ),
    _form("options with a continuation", "options continuation answer", _options),
    _thread("question"),
    _thread("title", "body", "selftext"),
    _question_answer(
        "question and answer",
        *("question", "answer", "context"),
        without="answers",
        applies=lambda record: not _has_choices(record),
    ),
    _question_answer("question and response", "question", "response", "context"),
    _question_answer("query and response", "query", "response", "context"),
    _question_answer("Bedrock input and output", "input", "output", without=_ELSE),
    _form("Bedrock image and caption", "image-ref", _image_reference, used="caption"),
    _media_paths("Hugging Face image folder", "file_name"),
    *(_media_paths("paths of media files", key) for key in ("path", "filename", "file")),
    _rename("tokens and ner_tags", tokens="tokens", tags="ner_tags"),
    *(_entities(key, may_be_empty=True) for key in ("entities", "spans")),
    *(_entities(key, may_be_empty=False) for key in ("label", "labels", "annotations")),
    Form(
        "task of Label Studio",
        frozenset(("data", "annotations")),
        lambda record: (_take_tags(record), {"tokens": "data", "tags": "annotations"}),
        applies=is_label_studio,
        tag=_tag_label_studio,
    ),
    _pair("query and positive", "query", "positive"),
    _pair("question and positive", "question", "positive"),
    _form("FlagEmbedding", "query pos", _flag_embedding, used=" ".join(sorted(NEGATIVE_KEYS))),
    _pair("sentence pairs", "sentence1", "sentence2"),
    _rename("sentence pairs with scores", query="sentence1", document="sentence2", label="score"),
    _pair("premise and hypothesis", "premise", "hypothesis"),
    # Numbers are classes, because NLI data sets number their three classes.
    _form(
        "premise, hypothesis and class",
        "premise hypothesis label",
        partial(_classified_pair, first="premise", second="hypothesis"),
    ),
    *(_labelled_pair(*names) for names in TEXT_PAIRS),
    ITEMS,
    _rename("history and target", "instruction question query", history="history", item="target"),
    _rename(
        "Bedrock raw text",
        f"{_ELSE} system system_prompt output answer response target expected {_NO_TEXT}",
        text="input",
    ),
)
"""Input forms, the most specific first."""

KEYS = (_OWN | _JUDGED | {"system", "system_prompt", "history", *TOOL_KEYS}).union(
    *(form.keys | form.used for form in FORMS)
)
"""All keys of forms and shapes."""


def forms_of(record: Record) -> list[Form]:
    """Return the forms that match a record.

    A form of a complete luthier shape needs a key more than the shape, such as ``question`` next to
    ``chosen`` and ``rejected``.
    """
    keys = record.keys()
    own = [needed for kind in SHAPES.values() for needed in kind.complete if needed <= keys]
    matching = [
        form
        for form in FORMS
        if form.keys <= keys
        and not form.without & keys
        # Otherwise luthier's own rows with one more column, such as `question`, would change their
        # meaning.
        and (not own or form.tag or any(needed < form.keys for needed in own))
        and form.applies(record)
    ]
    # Compared or classified texts are not a positive pair.
    paired = ("positive", "sentence1", "premise")
    judged = _JUDGED & keys
    return [form for form in matching if not (form.keys & {*paired} and judged - form.keys)]


def extra_keys(row: Row, record: Record, form: Form | None) -> Record:
    """Return the part of a record outside of the row's form."""
    kind = SHAPES[row.shape]
    used = kind.source_keys() if form is None else form.keys | form.used | kind.beside
    used |= context_keys(kind, record)
    return {key: value for key, value in record.items() if key not in used}


def _to_pair(row: Row, form: str = "prompt-completion") -> Record:
    turns = _conversation_of(row, form)
    if [turn.role for turn in turns] != ["user", "assistant"]:
        what = "a system prompt" if turns[0].role == "system" else f"{len(turns)} turns"
        raise _no_place(form, f"has {what}")
    return {"prompt": turns[0].content, "completion": turns[1].content}


def _to_chat(row: Row) -> Record:
    if isinstance(row, Conversation):
        return row.record()  # already in OpenAI's form, with tools and calls
    return {"messages": _turn_dicts(_conversation_of(row, "chat"))}


def _to_openai(row: Row) -> Record:
    if not isinstance(row, Preference):
        return _to_chat(row)
    return {
        "input": {"messages": _turn_dicts(row.messages), **tool_record(row.tools)},
        "preferred_output": _turn_dicts(row.chosen),
        "non_preferred_output": _turn_dicts(row.rejected),
    }


def _to_bedrock(row: Row) -> Record:
    if isinstance(row, RawText):
        return {"input": row.text}
    return _to_pair(row, "bedrock")


def _to_bedrock_conversation(row: Row) -> Record:
    turns = _conversation_of(row, "bedrock-conversation")
    blocks = [
        {"role": t.role, "content": [{"text": t.content}]} for t in turns if t.role != "system"
    ]
    system = [{"text": turn.content} for turn in turns if turn.role == "system"]
    context: Record = {"system": system} if system else {}
    return {"schemaVersion": "bedrock-conversation-2024", **context, "messages": blocks}


def _to_sharegpt(row: Row) -> Record:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = _conversation_of(row, "sharegpt")
    return {"conversations": [{"from": names[t.role], "value": t.content} for t in turns]}


def _to_alpaca(row: Row) -> Record:
    turns = list(_conversation_of(row, "alpaca"))
    system = turns.pop(0).content if turns[0].role == "system" else None
    *earlier, prompt, reply = turns
    converted: Record = {"instruction": prompt.content, "input": "", "output": reply.content}
    if system is not None:
        converted["system"] = system
    if earlier:
        # Strict, because the check of the order guarantees whole pairs before the last one.
        pairs = zip(earlier[::2], earlier[1::2], strict=True)
        converted["history"] = [[one.content, other.content] for one, other in pairs]
    return converted


def _to_text(row: Row) -> Record:
    if not isinstance(row, RawText):
        raise _no_place("text", "has more than a text")
    return {"text": row.text}


FORMS_WITH_TOOLS = frozenset({"rows", "chat", "openai"})
"""Output forms with tools, calls, results, reasoning and turns without learning."""
TARGETS: Mapping[str, Callable[[Row], Record]] = {
    "rows": lambda row: row.record(),
    "prompt-completion": _to_pair,
    "chat": _to_chat,
    "openai": _to_openai,
    "bedrock": _to_bedrock,
    "bedrock-conversation": _to_bedrock_conversation,
    "sharegpt": _to_sharegpt,
    "alpaca": _to_alpaca,
    "text": _to_text,
}
"""Output forms by name; ``rows`` is the shape's own form. Reading a written record gives equal
text."""


def _conversation_of(row: Row, form: str) -> Turns:
    """Return a row as a conversation that ends with the assistant."""
    if isinstance(row, Conversation | PromptCompletion | CitedAnswer):
        turns = row.turns()
        agent = any(turn.calls or turn.reasoning or turn.role == "tool" for turn in turns)
        agent = agent or (isinstance(row, Conversation) and bool(row.tools))
        if agent and form not in FORMS_WITH_TOOLS:
            raise _no_place(form, "has tools, calls or reasoning")
        if form not in FORMS_WITH_TOOLS and not all(turn.learned for turn in turns):
            raise _no_place(form, "has an assistant turn that is not learned")
        return turns
    if isinstance(row, JudgedAnswers):
        raise _no_place(form, "is a judgement of answers")
    raise _no_place(form, "is a prompt without a reply" if row.turns() else "is no conversation")


def _no_place(form: str, what: str) -> RowRefused:
    return RowRefused(
        "convert.form",
        f"The row {what}, which the form {form} does not support.",
        "Choose another form with --to (rows preserves everything), or remove the row.",
    )


def _turn_dicts(turns: Turns) -> list[dict[str, Any]]:
    return [turn.to_row() for turn in turns]
