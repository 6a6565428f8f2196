"""One record to one checked row: shapes told apart by their keys, every mistake named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from luthier.data import labels, preferences
from luthier.data.content import joined
from luthier.data.forms import Form, Names, forms_of
from luthier.data.making import new_row
from luthier.data.parsing import Record, json_kind, shown
from luthier.data.renames import RENAMES, listed, rename_fix
from luthier.errors import Problem, RowRefused
from luthier.types import Message, Row

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
_ANNOTATED = frozenset((_LABEL, _RATING, _TAGS, *preferences.SHAPES))
_ALL_SHAPES = ", ".join([*_SHAPES, *preferences.SHAPES])
_BESIDE_TEXT = ("label", "rating", "tags")
"""What makes another shape of a text: misspelt, it would be left out without a word."""
_OTHERS = {"id", "expected", "tags", *(key for keys in _SHAPES.values() for key in keys)} - {"text"}
_MOST_KNOWN = 100
_JUDGES = frozenset(("label", "thumb", "rating", "score"))
_ROLES = ("system", "user", "assistant")
_ROLE_NAMES = "system, user and assistant"
_ROLE_RENAMES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
} | {role: role for role in _ROLES}


class Checker:
    """Checks the rows of a source in order; what it has seen is its state.

    Args:
        file: the file in hand.
        problems: what is wrong is appended here.
        columns: the file's names of our keys, by ours; an empty one sets the key aside.
    """

    def __init__(
        self, file: str, problems: list[Problem], columns: Mapping[str, str] | None = None
    ) -> None:
        self.file = file
        self.problems = problems
        self.columns = columns or {}
        self.line = 0
        self.first: tuple[str, int] | None = None
        self.first_file = file
        self.form: Form | None = None
        """Of the first row, where it is none of our own shapes."""
        self.names: Names = self._called({})
        self.known: dict[tuple[str, ...], str] = {}
        """Shapes by the keys of rows of our own shapes, in their order."""
        self.given: Record = {}
        """The record in hand, its columns renamed."""
        self.line_of_id: dict[str | int, int] = {}

    def begin(self, file: str) -> None:
        """Go on with another file of the same source: its rows are like those before."""
        self.file = file
        self.line_of_id = {}

    @property
    def recognized(self) -> str | None:
        """What the rows are, for people; ``None`` before the first one."""
        if self.form is not None:
            return self.form.name
        return self.first[0] if self.first else None

    def report(self, rule: str, message: str, fix: str) -> None:
        """Note what is wrong with the row in hand."""
        self.problems.append(Problem(self.file, self.line, rule, message, fix))

    def row(self, line: int, record: Record) -> Row | None:
        """Return the row; None only when a problem was reported."""
        self.line = line
        keys = tuple(record)
        known = self.known.get(keys)
        if known is not None:
            self.given = record
            if "id" in record:
                self.check_id(record["id"])
            return self.shaped(known, record)
        given = record
        own = self.identified(record)
        if own is None:
            return None
        record = own
        shape = self.shape_of(record)
        # Where the keys alone tell the shape, the next row with the same ones need not be asked. Of an
        # answer with a label or a rating it is the value that tells whether it is a judgement.
        values_tell = "completion" in record and _JUDGES & record.keys()
        if shape and given is record and not values_tell and len(self.known) < _MOST_KNOWN:
            self.known[keys] = shape
        return self.shaped(shape, record)

    def identified(self, record: Record) -> Record | None:
        """The record in our own keys, its id checked; None only when a problem was reported."""
        own = self.own(record)
        if own is not None and "id" in own:
            self.check_id(own["id"])
        return own

    def shaped(self, shape: str | None, record: Record) -> Row | None:
        """The row of a record whose shape is known."""
        line = self.line
        if shape == _CHAT:
            return self.chat(record["messages"])
        if shape == _TEXT:
            text = self.text(record, "text", target=True)
            return new_row(self.file, line, text=text)
        if shape in _ANNOTATED:
            return self.annotated(shape, record)
        if shape == _PARTNERS:
            anchor, positive = self.text(record, "anchor"), self.text(record, "positive")
            return new_row(self.file, line, text=anchor, positive=positive)
        if shape == _PAIR:
            prompt = self.text(record, "prompt")
            completion = self.text(record, "completion", target=True)
            return new_row(self.file, line, prompt=prompt, completion=completion)
        return self.prompt(record) if shape == _PROMPT else None

    def own(self, record: Record) -> Record | None:
        """The record in one of our shapes, from its form; None when a problem was reported."""
        columns = self.beside_form(record) if self.columns else {}
        mapped = self.mapped(record, columns) if columns else record
        if mapped is None:
            return None
        self.given = mapped
        found = forms_of(mapped)
        generic = [f'"{key}"' for key in ("text", "prompt") if key in mapped]
        if len(found) > 1 or (found and generic):
            names = [*(form.name for form in found), *generic]
            message = f"The row can be read as {' or as '.join(names)}."
            fix = "Set aside the columns that are not meant, as with `data.columns.text=` (empty)."
            self.report("row.ambiguous", message, fix)
            return None
        form = found[0] if found else None
        if form is None and self.form is not None and self.form.keys & mapped.keys():
            form = self.form if not any(key in mapped for key in ("prompt", "messages")) else None
        if self.first is None:
            self.form = form
        elif form is not self.form:
            self.report_mixed(form.name if form else "of another form")
            return None
        if form is None:
            return mapped
        made, called = form.convert(mapped)
        self.names = self._called(called)
        return made

    def beside_form(self, record: Record) -> Mapping[str, str]:
        """The mapping without what a form gives anyhow.

        A form reads more columns than a mapping names (an Alpaca row's ``input``): where a mapping says
        of an instruction and its output what their form says too, the row stays in its form.
        """
        left = {key: value for key, value in record.items() if self.columns.get(key) != ""}
        found = forms_of(left)
        if len(found) != 1:
            return self.columns
        _, names = found[0].convert(dict(left))
        beside = {
            ours: theirs
            for ours, theirs in self.columns.items()
            if not theirs or names.get(ours) != theirs
        }
        keys = found[0].keys | found[0].used
        clash = any(theirs in keys or ours in names for ours, theirs in beside.items() if theirs)
        return self.columns if clash or len(beside) == len(self.columns) else beside

    def mapped(self, record: Record, columns: Mapping[str, str]) -> Record | None:
        """The record with ``columns`` renamed as asked; None when one is not there."""
        taken = {*columns.values(), *columns}
        made = {key: value for key, value in record.items() if key not in taken}
        for ours, theirs in columns.items():
            # A validation file may have our names already.
            source = ours if theirs and theirs not in record else theirs
            if source and source not in record:
                message = f"The column {shown(theirs)} is not there; the keys are {listed(record)}."
                self.report(
                    "column.missing",
                    message,
                    f"Mend `data.columns.{ours}={theirs}`, or mend the row.",
                )
                return None
            if source:
                made[ours] = record[source]
        return made

    def _called(self, names: Names) -> Names:
        """What the file calls our keys, through form and mapping."""
        return {
            **self.columns,
            **{ours: self.columns.get(own) or own for ours, own in names.items()},
        }

    def report_mixed(self, what: str) -> None:
        """Report a row that is not what the first row was."""
        assert self.first is not None
        first = self.form.name if self.form else self.first[0]
        line = self.first[1]
        where = f"line {line}" if self.first_file == self.file else f"{self.first_file}:{line}"
        message = f"The row is {what}, but the first row ({where}) is {first}."
        fix = f"Rewrite the row as {first}, or move it to a file of its own shape."
        self.report("row.mixed_shapes", message, fix)

    def prompt(self, record: Record) -> Row:
        """What is asked, and the answer expected where the row tells it."""
        expected = self.text(record, "expected") if "expected" in record else None
        return Row(self.file, self.line, prompt=self.text(record, "prompt"), expected=expected)

    def annotated(self, shape: str, record: Record) -> Row | None:
        """A text with its label or rating, words with their tags, or answers that were judged."""
        try:
            if shape == _LABEL:
                text = self.text(record, "text")
                label = labels.label(record["label"])
                return new_row(self.file, self.line, text=text, label=label)
            if shape == _TAGS:
                tokens, tags = labels.tagged(record.get("tokens"), record.get("tags"))
                return Row(self.file, self.line, tokens=tokens, tags=tags)
            if shape in preferences.SHAPES:
                return preferences.preference(shape, record, self.file, self.line)
            text = self.text(record, "text")
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
        if judged := preferences.shape_of(record):
            found = [judged]
        elif _PROMPT in found or _PAIR in found or _CHAT in found:
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
        if shape == _TEXT and (misspelt := self.misspelt(record)):
            key, meant = misspelt
            message = f"The row has a text and {shown(key)}, which is close to {shown(meant)}."
            fix = (
                f"Say `data.columns.{meant}={key}` (`--map {meant}={key}`) if that is meant, and "
                f"`data.columns.{meant}=` (empty) to learn the text alone."
            )
            self.report("row.ambiguous", message, fix)
            return None
        if self.first is None:
            self.first, self.first_file = (shape, self.line), self.file
        # A form may give rows with a system prompt as messages, and others as prompt and completion.
        if self.form is None and shape != self.first[0]:
            self.report_mixed(shape)
            return None
        return shape

    def misspelt(self, record: Record) -> tuple[str, str] | None:
        """A key beside a text that looks like one of ours, and that one, unless it was set aside."""
        for key in record:
            # "grading" is close to "rating" as well, but starts otherwise.
            able = [each for each in _BESIDE_TEXT if each[0] == key.strip()[:1].lower()]
            close = get_close_matches(key.strip().lower(), able, 1, cutoff=0.8)
            if close and close[0] not in (key, *self.columns):
                return key, close[0]
        return None

    def only_asks(self, record: Record) -> bool:
        """Whether a row with a prompt is meant without a reply: none is there, misnamed or lost."""
        if "completion" in record or (self.first and self.first[0] == _PAIR):
            return False
        misnamed = any(RENAMES.get(key.strip().lower()) == "completion" for key in record)
        return "expected" in record or not misnamed

    def report_unknown(self, record: Record) -> None:
        """Report keys that make no shape, with what to rename."""
        has = f"it has the keys {listed(record)}" if record else "it has no keys"
        message = f"The row has none of the shapes {_ALL_SHAPES}: {has}."
        fix = rename_fix(record, ("messages",)) or rename_fix(record, ("prompt", "completion"))
        fix = fix or rename_fix(record, ("text",))
        fix = fix or f"Rename the keys so that the row has one of the shapes {_ALL_SHAPES}."
        fix += (
            " Or say which column is what: `data.columns.text=COLUMN` and `data.columns.label=COLUMN` "
            "to classify, `data.columns.prompt=COLUMN` and `data.columns.completion=COLUMN` to write."
        )
        self.report("row.unknown_shape", message, fix)

    def text(
        self, holder: Record, key: str, number: int = 0, *, target: bool = False
    ) -> str | None:
        """Return a text that is there and not blank; ``number`` is that of the message, if any."""
        value = holder.get(key)
        if isinstance(value, str) and value and not value.isspace():
            return value
        called = self.names.get(key) or key
        name = f'"{called}" of message {number}' if number else f'"{called}"'
        if key not in holder:
            keys = listed(holder) if holder else "none"
            fix = rename_fix(holder, (key,)) or (_column_fix(holder, key) if not number else "")
            fix = fix or f'Add "{called}", or remove the row.'
            self.report("field.missing", f"{name} is missing; the keys are {keys}.", fix)
        elif not isinstance(value, str):
            fix = f"Write {name} as one string in double quotes."
            self.report("field.type", f"{name} must be a string, but is {json_kind(value)}.", fix)
        else:
            blank = "holds only white space" if value else "is empty"
            reason = ": there would be nothing to learn" if target else ""
            fix = f"Write the text of {name}, or remove the row."
            self.report("field.empty", f"{name} {blank}{reason}.", fix)
        return None

    def chat(self, value: object, answered: bool = True) -> Row | None:
        """A conversation; ``answered`` wants the assistant's turn at its end."""
        if not isinstance(value, list):
            called = self.names.get("messages") or "messages"
            message = f'"{called}" must be an array of objects, but is {json_kind(value)}.'
            fix = 'Write "messages": [{"role": "user", "content": "..."}, ...].'
            self.report("messages.type", message, fix)
            return None
        if not value:
            message = f'"{self.names.get("messages") or "messages"}" is an empty array.'
            fix = "Add at least one user and one assistant message, or remove the row."
            self.report("messages.empty", message, fix)
            return None
        turns = [self.message(number, item) for number, item in enumerate(value, 1)]
        messages = tuple(turn for turn in turns if turn is not None)
        # With a message missing or a role unknown, the order cannot be judged.
        if len(messages) == len(turns):
            self.check_order([message.role for message in messages], answered)
            spoken = [turn for turn in messages if turn.role == "assistant"]
            if answered and spoken and not any(turn.learned for turn in spoken):
                message = "Every turn of the assistant has the weight 0: nothing would be learned."
                fix = "Remove the weight of a turn that is to be learned, or remove the row."
                self.report("message.weight", message, fix)
        return new_row(self.file, self.line, messages=messages)

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
        weight = item.get("weight")
        # As OpenAI has it: 1 or 0; what else stands there says something else.
        learned = not (role == "assistant" and type(weight) in (int, float) and not weight)
        try:
            item = {**item, "content": joined(item["content"])} if "content" in item else item
        except RowRefused as bad:
            self.report(bad.rule, f"Message {number}: {bad.message}", bad.fix)
            return None
        content = self.text(item, "content", number, target=role == "assistant")
        return None if role is None or content is None else Message(role, content, learned)

    def role(self, number: int, item: Record) -> str | None:
        """Who speaks; ``None`` when a problem was reported."""
        if item.get("role") in _ROLES:
            return str(item["role"])
        if item.get("role") == "developer":  # what newer models of OpenAI call system
            return "system"
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


def _column_fix(record: Record, key: str) -> str:
    """Name the column that may be what is missing: one of text that is nothing else of ours."""
    able = [name for name in record if name not in _OTHERS and isinstance(record[name], str)]
    close = get_close_matches(key, able, 1) or (able if len(able) == 1 else [])
    return f"If {shown(close[0])} is meant, say `data.columns.{key}={close[0]}`." if close else ""
