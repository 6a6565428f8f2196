"""Records to checked rows: eight shapes, told apart by their keys.

``{"prompt", "completion"}``, ``{"messages": [{"role", "content"}, ...]}``, ``{"text"}``, text with
what it means: ``{"text", "label"}``, ``{"text", "rating"}``, ``{"tokens", "tags"}``,
``{"anchor", "positive"}``, and what is only asked: ``{"prompt"}``, with the ``expected`` answer where
there is one. Text is never altered. A file with anything wrong in it is refused as a whole, with every
problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from luthier.data import labels
from luthier.data.read import PLAIN_TEXT, Record, json_kind, read_records, shown
from luthier.errors import DataError, Problem, RowRefused
from luthier.types import Message, Row

RULES: Mapping[str, str] = {
    "file.missing": "The path names no file.",
    "file.directory": "The path names a folder; data is one file.",
    "file.unreadable": "The file exists but cannot be opened or read.",
    "file.unknown_format": "The file ending is none of the supported ones.",
    "file.binary": "The file is not UTF-8 text: compressed, UTF-16 or other binary data.",
    "file.empty": "The file holds no rows.",
    "line.too_long": "A line is longer than 16 MiB.",
    "encoding.utf8": "A line is not valid UTF-8.",
    "encoding.surrogate": "A string holds half of a surrogate pair, which is no character.",
    "json.invalid": "A line is not valid JSON.",
    "json.not_object": "A line is valid JSON, but not an object.",
    "json.duplicate_key": "One object has the same key twice, so one value would be lost.",
    "json.not_finite": "A number is NaN, infinite or too large to hold.",
    "json.too_deep": "Arrays or objects are nested too deeply to be read.",
    "row.unknown_shape": "A row has the keys of none of the shapes.",
    "row.ambiguous": "A row has keys of more than one shape.",
    "row.mixed_shapes": "A row has another shape than the first row of the file.",
    "field.missing": "A field that the shape needs is not there.",
    "field.type": "A field that must be a string is something else.",
    "field.empty": "A text field is empty or holds only white space.",
    "id.duplicate": "Two rows of one file have the same id.",
    "messages.type": "The messages are not an array of objects.",
    "messages.empty": "The array of messages is empty.",
    "message.role": "A role is none of system, user and assistant.",
    "message.order": "Messages do not alternate: system (optional), user, assistant, user, ...",
    "message.last": "The last message is not from the assistant, so its turn has no target.",
    "label.type": "A label is neither a string, a whole number, nor an array of them.",
    "label.duplicate": "One row names the same label twice.",
    "rating.type": "A rating is not a finite number.",
    "tags.length": "A row has more tokens than tags, or fewer.",
    "tags.type": "The tokens or tags are not an array of strings, or a token is empty.",
    "tags.bio": "A tag is none of O, B-name and I-name.",
    "message.tool_calls": "A message calls a tool, which cannot be learned yet.",
}
"""Every rule of reading and checking, with what it refuses; the reference is generated from it."""

_SHAPES: Mapping[str, tuple[str, ...]] = {
    '{"prompt", "completion"}': ("prompt", "completion"),
    '{"messages"}': ("messages",),
    '{"text"}': ("text",),
    '{"text", "label"}': ("label",),
    '{"text", "rating"}': ("rating",),
    '{"tokens", "tags"}': ("tokens",),
    '{"anchor", "positive"}': ("anchor", "positive"),
    '{"prompt"}': ("prompt",),
}
_PAIR, _CHAT, _TEXT, _LABEL, _RATING, _TAGS, _PARTNERS, _PROMPT = _SHAPES
_ALL_SHAPES = ", ".join(_SHAPES)
_RENAMES: Mapping[str, str] = {
    "instruction": "prompt",
    "question": "prompt",
    "input": "prompt",
    "response": "completion",
    "output": "completion",
    "answer": "completion",
    "conversations": "messages",
    "from": "role",
    "value": "content",
} | {key: key for key in ("prompt", "completion", "messages", "text", "role", "content")}

_ROLES = ("system", "user", "assistant")
_ROLE_NAMES = "system, user and assistant"
_ROLE_RENAMES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
} | {role: role for role in _ROLES}


def load_rows(path: Path) -> list[Row]:
    """Read and check a whole file; raise ``DataError`` with every problem if there is any."""
    problems: list[Problem] = []
    checker = Checker(str(path), problems)
    rows = [checker.row(line, record) for line, record in read_records(path, problems)]
    if problems:
        raise DataError(problems)
    return [row for row in rows if row is not None]


def stream_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[Row, bool]]:
    """Rows one after the other, never all in memory, and whether each ends a document.

    A plain-text file is one document and comes as many rows (see ``read_records``). Checked is all
    that :func:`load_rows` checks but for repeated ids, which would have to be remembered.
    """
    checker = Checker(str(path), problems)
    in_pieces = path.suffix.lower() in PLAIN_TEXT
    blank = True
    for line, record in read_records(path, problems, whole=False):
        if in_pieces:
            text = str(record["text"])
            blank = blank and text.isspace()
            yield Row(str(path), line, text=text), False
            continue
        record.pop("id", None)
        row = checker.row(line, record)
        if row is not None:
            yield row, True
    if in_pieces and blank and not problems:
        checker.line = 1
        checker.text({"text": " "}, "text", target=True)
    if in_pieces:
        yield Row(str(path), 1, text=""), True


class Checker:
    """Checks the rows of one file in order; what it has seen is its state."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self.file = file
        self.problems = problems
        self.line = 0
        self.first: tuple[str, int] | None = None
        self.line_of_id: dict[str | int, int] = {}

    def report(self, rule: str, message: str, fix: str) -> None:
        """Note what is wrong with the row in hand."""
        self.problems.append(Problem(self.file, self.line, rule, message, fix))

    def row(self, line: int, record: Record) -> Row | None:
        """Return the row; None only when a problem was reported."""
        self.line = line
        if "id" in record:
            self.check_id(record["id"])
        shape = self.shape_of(record)
        if shape == _CHAT:
            return self.chat(record["messages"])
        if shape == _TEXT:
            text = self.text(record, "text", target=True)
            return Row(self.file, line, text=text)
        if shape in (_LABEL, _RATING, _TAGS):
            return self.annotated(shape, record)
        if shape == _PARTNERS:
            anchor, positive = self.text(record, "anchor"), self.text(record, "positive")
            return Row(self.file, line, text=anchor, positive=positive)
        if shape == _PAIR:
            prompt = self.text(record, "prompt")
            completion = self.text(record, "completion", target=True)
            return Row(self.file, line, prompt=prompt, completion=completion)
        return self.prompt(record) if shape == _PROMPT else None

    def prompt(self, record: Record) -> Row:
        """What is asked, and the answer expected where the row tells it."""
        expected = self.text(record, "expected") if "expected" in record else None
        return Row(self.file, self.line, prompt=self.text(record, "prompt"), expected=expected)

    def annotated(self, shape: str, record: Record) -> Row | None:
        """A text with its label or rating, or words with their tags."""
        try:
            if shape == _TAGS:
                tokens, tags = labels.tagged(record.get("tokens"), record.get("tags"))
                return Row(self.file, self.line, tokens=tokens, tags=tags)
            text = self.text(record, "text")
            if shape == _LABEL:
                return Row(self.file, self.line, text=text, label=labels.label(record["label"]))
            return Row(self.file, self.line, text=text, rating=labels.rating(record["rating"]))
        except RowRefused as bad:
            self.report(bad.rule, bad.message, bad.fix)
            return None

    def check_id(self, value: object) -> None:
        """Report an id that an earlier row has."""
        # By exact type: True is an int in Python and would collide with 1.
        if type(value) is not str and type(value) is not int:
            return
        first = self.line_of_id.setdefault(value, self.line)
        if first != self.line:
            name = shown(str(value))
            message = f"The id {name} was already used on line {first}."
            self.report("id.duplicate", message, "Give each row its own id, or remove the copy.")

    def shape_of(self, record: Record) -> str | None:
        """Name the shape by its keys, or report why there is not exactly one."""
        found = [shape for shape, keys in _SHAPES.items() if any(key in record for key in keys)]
        if _PROMPT in found:
            found.remove(_PAIR if self.only_asks(record) else _PROMPT)
        if _PROMPT in found or _PAIR in found or _CHAT in found:
            # What else the row says of itself, its tags or rating, is no shape of its own.
            found = [shape for shape in found if shape in (_PAIR, _PROMPT, _CHAT, _TEXT)]
        elif len(found) > 1 and _TEXT in found:
            found.remove(_TEXT)  # the text of what is labelled
        if not found:
            self.report_unknown(record)
            return None
        if len(found) > 1:
            keys = listed(key for shape in found for key in _SHAPES[shape] if key in record)
            message = f"The row mixes {len(found)} shapes: it has the keys {keys}."
            fix = f"Keep the keys of one shape and remove or rename the others: {_ALL_SHAPES}."
            self.report("row.ambiguous", message, fix)
            return None
        shape = found[0]
        if self.first is None:
            self.first = (shape, self.line)
        first_shape, first_line = self.first
        if shape != first_shape:
            message = f"The row is {shape}, but the first row (line {first_line}) is {first_shape}."
            fix = f"Rewrite the row as {first_shape}, or move it to a file of its own shape."
            self.report("row.mixed_shapes", message, fix)
            return None
        return shape

    def only_asks(self, record: Record) -> bool:
        """Whether a row with a prompt is meant without a reply: none is there, misnamed or lost."""
        if "completion" in record or (self.first and self.first[0] == _PAIR):
            return False
        misnamed = any(_RENAMES.get(key.strip().lower()) == "completion" for key in record)
        return "expected" in record or not misnamed

    def report_unknown(self, record: Record) -> None:
        """Report keys that make no shape, with what to rename."""
        has = f"it has the keys {listed(record)}" if record else "it has no keys"
        message = f"The row has none of the shapes {_ALL_SHAPES}: {has}."
        fix = rename_fix(record, ("messages",)) or rename_fix(record, ("prompt", "completion"))
        fix = fix or rename_fix(record, ("text",))
        fix = fix or f"Rename the keys so that the row has one of the shapes {_ALL_SHAPES}."
        self.report("row.unknown_shape", message, fix)

    def text(
        self, holder: Record, key: str, number: int = 0, *, target: bool = False
    ) -> str | None:
        """Return a text that is there and not blank; ``number`` is that of the message, if any."""
        value = holder.get(key)
        if isinstance(value, str) and value and not value.isspace():
            return value
        name = f'"{key}" of message {number}' if number else f'"{key}"'
        if key not in holder:
            keys = listed(holder) if holder else "none"
            fix = rename_fix(holder, (key,)) or f'Add "{key}", or remove the row.'
            self.report("field.missing", f"{name} is missing; the keys are {keys}.", fix)
        elif not isinstance(value, str):
            message = f"{name} must be a string, but is {json_kind(value)}."
            self.report("field.type", message, f"Write {name} as one string in double quotes.")
        else:
            blank = "holds only white space" if value else "is empty"
            reason = ": there would be nothing to learn" if target else ""
            fix = f"Write the text of {name}, or remove the row."
            self.report("field.empty", f"{name} {blank}{reason}.", fix)
        return None

    def chat(self, value: object, answered: bool = True) -> Row | None:
        """A conversation; ``answered`` wants the assistant's turn at its end."""
        if not isinstance(value, list):
            message = f'"messages" must be an array of objects, but is {json_kind(value)}.'
            fix = 'Write "messages": [{"role": "user", "content": "..."}, ...].'
            self.report("messages.type", message, fix)
            return None
        if not value:
            fix = "Add at least one user and one assistant message, or remove the row."
            self.report("messages.empty", '"messages" is an empty array.', fix)
            return None
        turns = [self.message(number, item) for number, item in enumerate(value, 1)]
        messages = tuple(turn for turn in turns if turn is not None)
        # With a message missing or a role unknown, the order cannot be judged.
        if len(messages) == len(turns):
            self.check_order([message.role for message in messages], answered)
        return Row(self.file, self.line, messages=messages)

    def message(self, number: int, item: object) -> Message | None:
        """One turn; ``None`` when a problem was reported."""
        if not isinstance(item, dict):
            message = f"Message {number} must be an object, but is {json_kind(item)}."
            fix = 'Write each message as {"role": "...", "content": "..."}.'
            self.report("messages.type", message, fix)
            return None
        if item.get("tool_calls") or item.get("function_call"):
            message = f"Message {number} calls a tool; tool calls cannot be learned yet."
            fix = "Write the call as text in the content, or remove the row."
            self.report("message.tool_calls", message, fix)
            return None
        role = self.role(number, item)
        content = self.text(item, "content", number, target=role == "assistant")
        return None if role is None or content is None else Message(role, content)

    def role(self, number: int, item: Record) -> str | None:
        """Who speaks; ``None`` when a problem was reported."""
        if item.get("role") in _ROLES:
            return str(item["role"])
        role = self.text(item, "role", number)
        if role is None:
            return None
        reason = "tool messages cannot be learned yet; " if role in ("tool", "function") else ""
        message = f"Message {number} has the role {shown(role)}; {reason}allowed are {_ROLE_NAMES}."
        better = _ROLE_RENAMES.get(role.strip().lower())
        fix = f"Change the role to one of {_ROLE_NAMES}."
        if reason:
            fix = "Remove the row, or write the tool's result into a user message."
        elif better is not None:
            fix = f'Change the role {shown(role)} to "{better}".'
        self.report("message.role", message, fix)
        return None

    def check_order(self, roles: Sequence[str], answered: bool) -> None:
        """Report the first turn that is not where it belongs."""
        start = 1 if roles[0] == "system" else 0
        for index in range(start, len(roles)):
            if roles[index] != ("user", "assistant")[(index - start) % 2]:
                self.report_order(index + 1, roles)
                break
        if answered and roles[-1] != "assistant":
            number = len(roles)
            message = (
                f"The last message (message {number}) has the role {roles[-1]}; it must be"
                " assistant, as there is nothing to learn after it."
            )
            fix = "Add the assistant message that answers it, or remove the row."
            if number > 2 and roles[-2] == "assistant":
                fix = f"Add the assistant message that answers it, or remove message {number}."
            self.report("message.last", message, fix)

    def report_order(self, number: int, roles: Sequence[str]) -> None:
        """Report turn ``number``, and how to mend the order."""
        role = roles[number - 1]
        if role == "system":
            message = f"Message {number} has the role system, which may only come first."
            fix = "Join its text to the first message, or change its role."
        elif number == 1 or roles[number - 2] == "system":
            message = f"Message {number} has the role {role}; the first turn must be from the user."
            fix = f"Add the user message that comes before message {number}, or remove it."
        else:
            message = (
                f"Messages {number - 1} and {number} both have the role {role};"
                " user and assistant must take turns."
            )
            fix = "Join the two into one message, or add the turn that is missing between them."
        self.report("message.order", message, fix)


def listed(keys: Iterable[str]) -> str:
    """The first ten keys, for messages."""
    names = [shown(key) for key in keys]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def rename_fix(holder: Record, wanted: tuple[str, ...]) -> str:
    """Say which near-misses to rename to the wanted keys; empty when there is none."""
    steps, absent = [], []
    for target in wanted:
        found = [key for key in holder if _RENAMES.get(key.strip().lower()) == target]
        if len(found) == 1:
            steps.append(f'rename {shown(found[0])} to "{target}"')
        elif found:
            steps.append(f'join {listed(found)} into "{target}"')
        else:
            absent.append(f'add "{target}"')
    if not steps:
        return ""
    fix = " and ".join(steps + absent)
    hint = ', as an array of {"role", "content"}' if wanted == ("messages",) else ""
    return f"{fix[:1].upper()}{fix[1:]}{hint}."
