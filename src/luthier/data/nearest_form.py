"""Advice for rows of no known format: the nearest format, in the column names of the file."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.data.conversations.turn_marks import truth_of
from luthier.data.field_checks import rename_fix
from luthier.data.files.containers import TIME_COLUMNS
from luthier.data.files.interactions import ITEM_COLUMNS, USER_COLUMNS, find_name
from luthier.data.files.line_forms import TAG
from luthier.data.files.parsing import Record, quote
from luthier.data.files.times import is_date, parse_number
from luthier.data.inputs import media_kind
from luthier.data.shapes.conversations import LONGEST_CLASS
from luthier.data.shapes.questions import ANSWERS_EXAMPLE

_PASSAGES = ("passage", "doc", "candidate", "text", "context", "paragraph", "title")
_RELEVANCES = ("label", "relevance", "relevant", "is_relevant", "score", "similarity")
_POSITIVES = ("positives", "positive_passages", "relevant_passages")
LABEL_NAMES = ("label", "class", "category", "intent", "sentiment", "topic", "tag", "type")
"""Usual names of label columns."""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "label": LABEL_NAMES,
    "text": ("content", "body", "review", "comment", "sentence", "tweet", "message", "description"),
}
"""Usual names of columns, by luthier's key."""


def nearest_form(record: Record) -> str:
    """Return the fix for a record of no known format."""
    fix = _likeliest_fix(record)
    user, item = find_name(record, USER_COLUMNS), find_name(record, ITEM_COLUMNS)
    if user and item:
        fix += f" For a log of users and items, set `data.columns.user={user}` and "
        fix += f"`data.columns.items={item}`."
    return fix


def _likeliest_fix(record: Record) -> str:
    if fix := _search_fix(record) or _media_fix(record) or _question_fix(record):
        return fix
    if fix := _series_fix(record):
        return fix
    for keys in (("messages",), ("prompt", "completion"), ("text",)):
        if fix := rename_fix(record, keys):
            return fix
    texts = [
        key
        for key, value in record.items()
        if isinstance(value, str) and key.strip().lower() != "id"
    ]
    if fix := _pair_fix({key: str(record[key]) for key in texts}):
        return fix
    if any(TAG.fullmatch(str(record[key]).strip()) for key in texts) and len(texts) > 1:
        return (
            "Write lines of a word, a tab and its tag, with a blank line between sentences (CoNLL)."
        )
    by_name = {
        key: next((each for each in record if each.strip().lower() in names), "")
        for key, names in _NAMES.items()
    }
    if len(texts) > 1 and not any(by_name.values()):
        long = [key for key in texts if len(str(record[key])) > LONGEST_CLASS]
        one, other = (long if len(long) == 2 else texts)[:2]
        return (
            f"If {quote(other)} is the reply to {quote(one)}, set `data.columns.prompt={one}` and "
            f"`data.columns.completion={other}`. If {quote(other)} is a class, set "
            f"`data.columns.text={one}` and `data.columns.label={other}`."
        )
    label = by_name["label"]
    text = by_name["text"] or next((key for key in texts if key != label), "")
    if not text:
        return 'Add a text, as in {"text": "..."} or {"prompt": "...", "completion": "..."}.'
    fix = f"Set `data.columns.text={text}`"
    return f"{fix}." if label in ("", "label") else f"{fix} and `data.columns.label={label}`."


def _series_fix(record: Record) -> str:
    """Return the fix for times and numbers next to text; empty for other rows."""
    named = (name for name in record if name.strip().lower() in TIME_COLUMNS)
    time = next(named, next(iter(record), ""))
    if time.strip().lower() not in TIME_COLUMNS and not is_date(str(record[time])):
        return ""
    others = [name for name in record if name != time and name.strip().lower() not in LABEL_NAMES]
    # An empty cell and a decimal comma are no text.
    cells = {name: str(record[name]).strip().replace(",", ".") for name in others}
    texts = [name for name, cell in cells.items() if cell and parse_number(cell) is None]
    # A text of several words is a text to read.
    if not texts or 2 * len(texts) > len(others) or any(" " in str(record[n]) for n in texts):
        return ""
    settings = ", ".join(f"`data.columns.{name}=`" for name in texts)
    return f"For a time series, leave out the columns without numbers: {settings}."


def _pair_fix(texts: Mapping[str, str]) -> str:
    """Return the fix for two texts with a column of yes and no; empty for other rows."""
    marks = [key for key, text in texts.items() if truth_of(text) is not None]
    # One word is a name or a tag.
    sentences = [key for key in texts if key not in marks and " " in texts[key].strip()]
    sides = sorted(sentences, key=lambda key: -len(texts[key]))[:2]
    if len(marks) != 1 or len(sides) < 2:
        return ""
    one, other = sorted(sides, key=[*texts].index)
    names = {"text_a": one, "text_b": other, "label": marks[0]}
    settings = [f"`data.columns.{key}={name}`" for key, name in names.items()]
    return f"For pairs of texts that are alike or not, set {', '.join(settings)}."


def _search_fix(record: Record) -> str:
    """Return the fix for two compared texts; empty for other rows."""
    if "hypothesis" in record and "premise" not in record:
        return 'Add the text of "premise": a hypothesis alone has no label.'
    if "query" not in record:
        return ""
    for key in _POSITIVES:
        if isinstance(record.get(key), list):
            return f'Write a row {{"query", "positive"}} for each item of {quote(key)}.'
    document = next((key for key in _PASSAGES if isinstance(record.get(key), str)), "")
    label = next((key for key in _RELEVANCES if key in record), "")
    if not document:
        return ""
    if not label:
        return f"Set `data.columns.positive={document}`."
    read = f" and `data.columns.label={label}`" if label != "label" else ""
    return f"Set `data.columns.document={document}`{read}, with a label from 0 to 1."


def _media_fix(record: Record) -> str:
    """Return the fix for a column of paths; empty without such a column."""
    for key, value in record.items():
        if isinstance(value, str) and "\n" not in value and (kind := media_kind(value)):
            return f"Set `data.columns.{kind}={key}`."
    number = next((key for key in ("index", "image_id", "id") if type(record.get(key)) is int), "")
    if "caption" in record and number:
        return f"For images of an .npz file in the same folder, set `data.columns.image={number}`."
    return ""


def _question_fix(record: Record) -> str:
    """Return the fix for a question about a context without answers; empty for other rows."""
    if not {"question", "context"} <= record.keys():
        return ""
    return (
        f"Add the answers as spans of the context ({ANSWERS_EXAMPLE}), or as text to generate "
        '("answer": …).'
    )
