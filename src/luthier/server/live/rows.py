"""Training rows from records of captured requests and their feedback."""

from __future__ import annotations

import gzip
import json
import operator
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import Select, or_, select

from luthier.data.files.containers import BROKEN
from luthier.data.files.parsing import MAX_LINE_BYTES
from luthier.errors import ObjectRefused, RefusedInput
from luthier.server.live.feedback import OUTCOME, latest_feedback, parse_value, ratings_of
from luthier.server.live.records import LOGS
from luthier.server.stores.objects import Objects
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import now
from luthier.server.tables.live.captures import CapturedRequest, Feedback
from luthier.server.tables.objects import StoredObject, get_bucket

Row = dict[str, Any]
Message = dict[str, Any]
RowKind = Literal["sft", "dpo", "kto", "classification", "regression"]
KINDS: tuple[RowKind, ...] = get_args(RowKind)
GOOD, BAD = 4.0, 2.0
"""Mean ratings from which, and up to which, an answer is desirable or undesirable."""
_TRUNCATED = (
    None, "length", "content_filter", "max_tokens", "model_context_window_exceeded",
    "content_filtered", "guardrail_intervened",
)  # fmt: skip
"""Stop reasons of incomplete answers; None if the stream broke."""
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
"""Types of items of the responses API with a form in rows."""
_PAGE = 200
_PERIODS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class CapturedAnswer:
    """An input of a captured request with the model's answer and the feedback about both."""

    request: str
    """Request id."""
    prompt: str | list[Message]
    """Text without a chat template, or messages in OpenAI's form."""
    reply: Message
    """Message of the assistant, or the fields of a prediction."""
    tools: list[Any] = field(default_factory=list)
    feedback: Sequence[Feedback] = ()
    position: int = 0

    def latest(self, *names: str) -> Any:
        """Return the latest value of the feedback named ``names``, the first name first."""
        for name in names:
            found = [e for e in self.feedback if (e.name, e.position) == (name, self.position)]
            if found:
                return found[-1].value["value"]
        return None

    @property
    def rating(self) -> float | None:
        """Mean rating of the raters from 1 to 5."""
        ratings = ratings_of(self.feedback, self.position)
        return sum(ratings) / len(ratings) if ratings else None

    @property
    def text(self) -> str:
        """Text of the last input."""
        content = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]
        return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Condition:
    """Comparison with a value, such as ``>=4``."""

    compare: Callable[[Any, Any], bool]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a comparison."""
        match = re.fullmatch(r"\s*(>=|<=|!=|==|=|>|<)\s*(\S+)\s*", text)
        value = parse_value(match[2]) if match else None
        if match is None or not isinstance(value, int | float):
            raise RefusedInput(
                f'"{text}" is not a comparison. Write, for example, ">=4" or "=true"'
            )
        return cls(_COMPARISONS[match[1]], value)

    def holds(self, value: Any) -> bool:
        """Return True if ``value`` exists and satisfies the comparison."""
        return value is not None and self.compare(value, self.value)


def parse_since(text: str) -> datetime:
    """Return the moment of ``7d``, ``12h`` or an ISO date."""
    if match := re.fullmatch(r"(\d{1,6})([mhdw])", text):
        return now() - timedelta(**{_PERIODS[match[2]]: int(match[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise RefusedInput(f'"{text}" is not a period. Write 7d, 12h or 2026-01-31') from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def requests_to(account: str, model: str, since: datetime | None = None) -> Select[CapturedRequest]:
    """Return the query for the captured requests to a model, oldest first.

    ``model`` is the name that clients sent, a library id, or the name of a custom model.
    """
    own = select(CustomModel.stored_id).where(
        CustomModel.account == account, CustomModel.name == model
    )
    return (
        select(CapturedRequest)
        .where(
            CapturedRequest.account == account,
            or_(
                CapturedRequest.model == model,
                CapturedRequest.stored_id == model,
                CapturedRequest.stored_id.in_(own),
            ),
            CapturedRequest.created >= (since or datetime.min.replace(tzinfo=UTC)),
        )
        .order_by(CapturedRequest.seq)
    )


def captured_answers(
    objects: Objects, account: str, model: str, since: datetime | None = None
) -> Iterator[CapturedAnswer]:
    """Yield the answers of successful requests of :func:`requests_to`, with feedback."""
    with objects.database.read() as session:
        query = requests_to(account, model, since).where(CapturedRequest.error == "")
        rows = session.scalars(query).all()
    for start in range(0, len(rows), _PAGE):
        page = rows[start : start + _PAGE]
        with objects.database.read() as session:
            feedback = latest_feedback(session, [row.seq for row in page])
        for row in page:
            with suppress(RefusedInput):  # a client deleted or replaced the object
                yield from read_answers(objects, row, feedback.get(row.seq, ()))


def read_answers(
    objects: Objects, row: CapturedRequest, feedback: Sequence[Feedback] = ()
) -> list[CapturedAnswer]:
    """Return the answers of a captured request.

    Raises:
        RefusedInput: if a client deleted, replaced or damaged the object.
    """
    _, pieces = objects.open_range(
        row.account, row.bucket, row.key, lambda found: (row.offset, row.size)
    )
    address = f"s3://{row.bucket}/{row.key}"
    with _decompress(pieces, address) as file:
        return _known_answers(
            objects, row.account, _read_record(file, address) or {}, address, feedback
        )


def _known_answers(
    objects: Objects, account: str, record: Row, address: str, feedback: Sequence[Feedback] = ()
) -> list[CapturedAnswer]:
    try:
        return [*answers_of(_with_bodies(objects, account, record), feedback)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RefusedInput(f"{address} has a record of an unknown form") from error


def logged_answers(
    objects: Objects, account: str, bucket: str, prefix: str, keeps: Callable[[Row], bool]
) -> Iterator[CapturedAnswer]:
    """Yield the answers in invocation logs below ``prefix``, of this server or copied from AWS.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
        RefusedInput: Naming the object, if it is damaged, or no invocation log.
    """
    with objects.database.read() as session:
        seq = get_bucket(session, account, bucket).seq
        below = StoredObject.key.startswith(prefix, autoescape=True)
        query = select(StoredObject.key).where(StoredObject.bucket_seq == seq, below)
        keys = list(session.scalars(query.order_by(StoredObject.key)))
    for key in keys:
        # Bodies are in a folder `data`; the client's prefix may have a folder of this name, too.
        if not key.endswith(".json.gz") or "/data/" in key.rpartition(LOGS)[2]:
            continue
        address = f"s3://{bucket}/{key}"
        with _decompress(_content(objects, account, bucket, key), address) as file:
            while (record := _read_record(file, address)) is not None:
                if not keeps(record) or "errorCode" in record:
                    continue
                yield from _known_answers(objects, account, record, address)


def _content(objects: Objects, account: str, bucket: str, key: str) -> Iterator[bytes]:
    try:
        return objects.open_range(account, bucket, key, lambda found: (0, found.size))[1]
    except ObjectRefused as refused:
        raise RefusedInput(f"s3://{bucket}/{key} does not exist") from refused


@contextmanager
def _decompress(pieces: Iterable[bytes], address: str) -> Iterator[gzip.GzipFile]:
    """Yield the decompressed bytes of an object as a file."""
    # A file, because gzip needs to seek: a log has one gzip member per record.
    with tempfile.SpooledTemporaryFile(MAX_LINE_BYTES) as raw:
        raw.writelines(pieces)
        raw.seek(0)
        try:
            with gzip.open(raw) as file:
                yield file
        except BROKEN as error:
            raise RefusedInput(f"{address} is not a complete gzip file: {error}") from error


def _read_record(file: gzip.GzipFile, address: str) -> Row | None:
    """Return the record in the next line of a log; None at the end."""
    # With a limit: a small gzip file can unpack to a line of many gigabytes.
    line = file.readline(MAX_LINE_BYTES + 1)
    if not line:
        return None
    if len(line) > MAX_LINE_BYTES:
        raise RefusedInput(f"{address} has a record of more than {MAX_LINE_BYTES:,} bytes")
    found = _parse(line, address)
    if not isinstance(found, dict):
        raise RefusedInput(f"{address} is not an invocation log")
    return found


def _parse(data: bytes, address: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedInput(f"{address} is not JSON: {error}") from error


def _with_bodies(objects: Objects, account: str, record: Row) -> Row:
    """Load the bodies stored as separate objects, without those too large for a training row."""
    for side in ("input", "output"):
        part = record.get(side, {})
        if address := part.get(f"{side}BodyS3Path"):
            bucket, _, key = address.removeprefix("s3://").partition("/")
            with _decompress(_content(objects, account, bucket, key), address) as file:
                body = file.read(MAX_LINE_BYTES + 1)
                if len(body) <= MAX_LINE_BYTES:
                    part[f"{side}BodyJson"] = _parse(body, address)
    return record


def answers_of(record: Row, feedback: Sequence[Feedback] = ()) -> Iterator[CapturedAnswer]:
    """Yield the answers of a record; records without text have none."""
    sent = record["input"].get("inputBodyJson")
    returned = record.get("output", {}).get("outputBodyJson")
    if not isinstance(sent, dict) or not isinstance(returned, dict):
        return
    tools: list[Any] = sent.get("tools") or []
    # The prompt had passages that the record lacks, so a row would teach the reply without its
    # source.
    if any(each.get("type", "function") != "function" for each in tools):  # such as file_search
        return
    prompt: str | list[Message] = []
    replies: list[Message] = []
    reasons: list[str | None] = []
    if "answers" in returned:  # predictions
        for position, (each, reply) in enumerate(
            zip(sent["inputs"], returned["answers"], strict=True)
        ):
            if each.get("text"):
                yield CapturedAnswer(
                    record["requestId"], each["text"], reply, [], feedback, position
                )
        return
    if "choices" in returned:
        prompt = sent.get("messages") or sent.get("prompt") or ""
        replies = [
            _assistant(each["message"])
            if "message" in each
            else {"role": "assistant", "content": each["text"]}
            for each in returned["choices"]
        ]
        reasons = [each.get("finish_reason", "stop") for each in returned["choices"]]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) != 1:  # several prompts, each with its own choices
                return
            prompt = prompt[0]
        elif isinstance(prompt, list) and not all(isinstance(each, dict) for each in prompt):
            return  # token ids
    elif "generation" in returned:
        reasons = [returned.get("stop_reason", "stop")]
        prompt = sent["prompt"]
        replies = [{"role": "assistant", "content": returned["generation"]}]
    elif "stopReason" in returned:
        reasons = [returned["stopReason"]]
        system = " ".join(each.get("text", "") for each in sent.get("system") or ())
        prompt = [{"role": "system", "content": system}] if system else []
        prompt += map(_plain, sent["messages"])
        tools = [
            _tool(each["toolSpec"]) for each in (sent.get("toolConfig") or {}).get("tools", ())
        ]
        replies = [_plain(returned["output"]["message"])]
    elif returned.get("object") == "response":
        if sent.get("previous_response_id"):  # the record has only a part of the conversation
            return
        items = sent["input"]
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        if not all(map(_is_text, items)):
            return
        reasons = ["stop" if returned.get("status", "completed") == "completed" else None]
        system = sent.get("instructions") or ""
        prompt = [{"role": "system", "content": system}] if system else []
        prompt += _turns(items)
        replies = _turns(returned["output"])[:1]
        tools = [{"type": "function", "function": each} for each in tools]
    if not prompt or _lacks_media(prompt):
        return
    for position, (reply, reason) in enumerate(zip(replies, reasons, strict=False)):
        # A cut reply would teach the model to stop in the middle of a sentence.
        if reason not in _TRUNCATED:
            yield CapturedAnswer(record["requestId"], prompt, reply, tools, feedback, position)


def _is_text(item: Mapping[str, Any]) -> bool:
    """Return True if a row can express an item of the responses API."""
    content = item.get("content") or ()
    parts = () if isinstance(content, str) else content
    return item.get("type", "message") in _ITEMS and all("text" in part for part in parts)


def _lacks_media(value: Any) -> bool:
    """Return True for content without the media, after redaction."""
    if isinstance(value, dict):
        empty = any(value.get(name) == "" for name in ("url", "image_url", "bytes", "data"))
        return empty or any(map(_lacks_media, value.values()))
    return isinstance(value, list) and any(map(_lacks_media, value))


def input_text(row: Row) -> str:
    """Return the text of a training row that :attr:`CapturedAnswer.text` is for a request."""
    turns = row.get("text") or row.get("messages") or row.get("prompt") or ""
    if isinstance(turns, list):
        turns = next((each["content"] for each in reversed(turns) if each["role"] == "user"), "")
    return turns if isinstance(turns, str) else ""


def text_of(reply: Message) -> str:
    """Return the text of a reply, without the blocks of reasoning and tool calls of Converse."""
    content = reply.get("content") or ""
    if isinstance(content, list):
        return "\n".join(block["text"] for block in content if "text" in block)
    return str(content)


def _assistant(message: Mapping[str, Any]) -> Message:
    kept = ("content", "tool_calls", "reasoning_content")
    return {"role": "assistant"} | {name: message[name] for name in kept if message.get(name)}


def _plain(message: Mapping[str, Any]) -> Message:
    """Return a message of Converse in OpenAI's form if the content is text, otherwise unchanged."""
    blocks = message["content"]
    if all("text" in block for block in blocks):
        return {"role": message["role"], "content": "\n".join(block["text"] for block in blocks)}
    return dict(message)


def _tool(spec: Mapping[str, Any]) -> Row:
    function = {"name": spec["name"], "parameters": spec["inputSchema"]["json"]}
    described = {"description": spec["description"]} if spec.get("description") else {}
    return {"type": "function", "function": function | described}


def _turns(items: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Return items of the responses API as messages."""
    turns: list[Message] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            content = item["content"]
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content)
            turns.append({"role": item["role"], "content": content})
        elif kind == "function_call":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turns[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item["output"]
            if isinstance(output, list):
                output = "".join(part.get("text", "") for part in output)
            turns.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    return turns


def filter_answers(
    answers: Iterable[CapturedAnswer], rating: Condition | None, outcomes: Mapping[str, Condition]
) -> Iterator[CapturedAnswer]:
    """Yield the answers whose rating and outcomes satisfy the conditions."""
    for answer in answers:
        rated = rating is None or rating.holds(answer.rating)
        if rated and all(each.holds(answer.latest(OUTCOME + n)) for n, each in outcomes.items()):
            yield answer


def training_rows(
    answers: Iterable[CapturedAnswer], kind: RowKind, rated: bool = False
) -> list[Row]:
    """Return the rows for a kind of training, without duplicates.

    ``requests`` of a row are the ids of the requests that the row comes from. With ``rated``, a
    filter has accepted the answers, so that an answer without a correction counts as correct. A
    label with a good rating counts as correct, too.
    """
    rows: dict[str, Row] = {}
    found = [*answers]
    pairs = _rated_pairs(found) if kind == "dpo" else ()
    made = ((row, [each.request]) for each in found for row in _rows_of(each, kind, rated))
    for row, requests in (*made, *pairs):
        key = json.dumps(row, sort_keys=True)
        known = rows.setdefault(key, {**row, "requests": []})
        known["requests"] += [each for each in requests if each not in known["requests"]]
    return [*rows.values()]


def _rows_of(answer: CapturedAnswer, kind: RowKind, rated: bool) -> Iterator[Row]:
    better = answer.latest("corrected", "preferred")
    text = text_of(answer.reply)
    if kind in ("classification", "regression"):
        label = answer.latest("label")
        if label is None and (rated or (answer.rating or 0) >= GOOD):
            label = answer.reply.get("label", answer.reply.get("rating", answer.reply.get("score")))
        if label is None or not answer.text:
            return
        if kind == "classification":
            yield {"text": answer.text, "label": label if isinstance(label, list) else str(label)}
        elif isinstance(number := parse_value(label), int | float):
            yield {"text": answer.text, "rating": number}
    elif "role" not in answer.reply:
        return  # a prediction
    elif kind == "sft":
        mean = answer.rating
        # Replies without a rating stay: the user chose to train on the captured replies.
        if not better and not rated and mean is not None and mean <= BAD:
            return
        reply = {"role": "assistant", "content": better} if better else answer.reply
        if reply.get("content") or reply.get("tool_calls"):
            yield _with_reply(answer, reply)
    elif kind == "dpo":
        if better and text and better != text:
            yield {"prompt": answer.prompt, "chosen": better, "rejected": text, **_tools(answer)}
    elif (mean := answer.rating) is not None and text and not BAD < mean < GOOD:
        yield {**_with_reply(answer, answer.reply), "label": mean >= GOOD}


def _with_reply(answer: CapturedAnswer, reply: Message) -> Row:
    if isinstance(answer.prompt, str):
        return {"prompt": answer.prompt, "completion": reply["content"]}
    return {"messages": [*answer.prompt, reply], **_tools(answer)}


def _tools(answer: CapturedAnswer) -> Row:
    return {"tools": answer.tools} if answer.tools else {}


def _rated_pairs(answers: Iterable[CapturedAnswer]) -> Iterator[tuple[Row, list[str]]]:
    """Yield the best and the worst rated answer to each prompt."""
    groups: dict[str, list[tuple[float, CapturedAnswer]]] = {}
    for each in answers:
        if (rating := each.rating) is not None and text_of(each.reply):
            # Only answers to the same prompt can be compared, because ratings of different prompts
            # also measure how hard they are.
            groups.setdefault(json.dumps(each.prompt), []).append((rating, each))
    for group in groups.values():
        (worst, bad), (best, good) = min(group, key=_first), max(group, key=_first)
        sides = {"chosen": text_of(good.reply), "rejected": text_of(bad.reply)}
        if worst < best and sides["chosen"] != sides["rejected"]:
            yield {"prompt": good.prompt, **sides, **_tools(good)}, [good.request, bad.request]


def _first(pair: tuple[float, CapturedAnswer]) -> float:
    return pair[0]
