"""Conversations with tools as a model reads them, and the calls in what it writes.

A template that has a place for tools gets them as it wants them. For other models the tools are listed
in the system text, in JSON, and the call is asked for as JSON; what was called and what came back
stands in the conversation as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.serving.constraints import CALL_CLOSE, CALL_OPEN, check_depth
from luthier.serving.inference import Chat, InferenceRefused, Tool, ToolCall, Turn
from luthier.store.ids import random_id
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.types import IntArray

LISTED = """You can call these functions, each described in JSON:

{tools}

To call one, answer with nothing but a JSON object with the members "name", the function's name, and \
"arguments", an object that matches its parameters. Where no function helps, answer in words."""


def new_call_id() -> str:
    """An id for a call, as Bedrock writes them."""
    return "tooluse_" + random_id(22)


def template_of(chat: ChatFormat) -> str:
    """The text of the model's chat template; empty without one."""
    found = chat.tokenizer.chat_template if chat.template == "chat" else ""
    if isinstance(found, dict):
        found = found.get("tool_use") or found.get("default") or ""
    return str(found or "")


def knows_tools(chat: ChatFormat) -> bool:
    """Whether the model's template has a place for tools."""
    return re.search(r"\btools\b", template_of(chat)) is not None


def marks_calls(chat: ChatFormat) -> bool:
    """Whether the model's template puts calls between tags."""
    return knows_tools(chat) and CALL_OPEN in template_of(chat)


def encode(
    chat: ChatFormat, asked: Chat, check: Callable[[str], None] = lambda text: None
) -> IntArray:
    """Token ids that an answer to ``asked`` continues; ``check`` may refuse its text before.

    Raises:
        InferenceRefused: for a conversation that the model's template does not take.
    """
    if not asked.turns:
        raise InferenceRefused("A conversation has at least one message.", "messages")
    tools = () if asked.tool_choice == "none" else asked.tools
    for tool in tools:
        check_depth(tool.parameters)
    native = knows_tools(chat)
    try:
        if native and (tools or any(turn.calls or turn.role == "tool" for turn in asked.turns)):
            text = chat.render(
                _for_template(asked.turns),
                reply=True,
                tools=[_function(tool) for tool in tools],
            )
            check(text)
            return chat.tokens(text, first=False)
        text = chat.prompt_text(_plain(asked.turns, tools))
        check(text)
        return chat.prompt_tokens(text)
    except RecipeError as error:
        raise InferenceRefused(str(error), "messages") from error


def _for_template(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as transformers' templates read them."""
    names, found = _called(turns), []
    for turn in turns:
        made: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in turn.calls
            ]
        if turn.role == "tool":
            name = names.get(turn.call_id, "function")
            made |= {"tool_call_id": turn.call_id, "name": name}
        found.append(made)
    return found


def _function(tool: Tool) -> dict[str, Any]:
    described = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": described}


def _called(turns: Sequence[Turn]) -> dict[str, str]:
    """Names of the functions that were called, by the ids of the calls."""
    return {call.id: call.name for turn in turns for call in turn.calls}


def _plain(turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in words, for templates without a place for tools."""
    names = _called(turns)
    said: list[tuple[str, list[str]]] = []
    for turn in turns:
        content = turn.content
        if turn.calls:
            calls = [json.dumps(_as_json(call), ensure_ascii=False) for call in turn.calls]
            content = "\n".join([*([content] if content else []), *calls])
        role = turn.role
        if role == "tool":
            name = names.get(turn.call_id, "function")
            role, content = "user", f"Result of {name}: {content}"
        if said and said[-1][0] == role == "user":
            # Results and what is said behind them are one turn: many templates want them to take turns.
            said[-1][1].append(content)
        else:
            said.append((role, [content]))
    messages = [Message(role, "\n".join(parts)) for role, parts in said]
    if tools:
        listed = "\n".join(json.dumps(_function(tool)["function"]) for tool in tools)
        text = LISTED.format(tools=listed)
        if messages[0].role == "system":
            text = f"{messages.pop(0).content}\n\n{text}"
        messages.insert(0, Message("system", text))
    return messages


def _as_json(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": dict(call.arguments)}


class CallSplitter:
    """Parts the text of an answer, as it comes, into words for the reader and calls of tools.

    What may be a call is held back until it is whole.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = {tool.name for tool in tools}
        self._held = ""
        self._shown = False
        self._calling = False

    def feed(self, text: str) -> str:
        """The next characters; what of all that is held can be shown."""
        self._held += text
        if self._calling:
            return ""
        if not self._shown:
            begun = self._held.lstrip()
            if not begun:
                return ""
            if begun[0] in "{[":
                self._calling = True
                return ""
        at = self._held.find(CALL_OPEN)
        if at >= 0:
            self._calling = True
        else:
            at = len(self._held) - _overlap(self._held, CALL_OPEN)
        shown, self._held = self._held[:at], self._held[at:]
        if self._calling and not shown.strip():
            shown = ""
        self._shown = self._shown or bool(shown.strip())
        return shown

    def end(self) -> tuple[str, list[ToolCall]]:
        """Words that are left, and the calls."""
        calls = parse_calls(self._held, self._names)
        return ("" if calls else self._held), calls


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that ``mark`` begins with, and is longer than."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def parse_calls(text: str, names: set[str]) -> list[ToolCall]:
    """The calls in ``text``; none where it is anything but calls of the functions ``names``."""
    if CALL_OPEN in text:
        bodies = [part.partition(CALL_CLOSE)[0] for part in text.split(CALL_OPEN)[1:]]
    else:
        bodies = [text]
    calls: list[ToolCall] = []
    for body in bodies:
        try:
            found = json.loads(body)
        except ValueError:
            return []
        for each in found if isinstance(found, list) else [found]:
            call = _call_in(each, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _call_in(found: Any, names: set[str]) -> ToolCall | None:
    if not isinstance(found, dict):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    if found.get("name") not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(new_call_id(), found["name"], arguments)
