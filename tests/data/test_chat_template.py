"""Templates are rendered as transformers renders them, and let out of the sandbox as little."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
from jinja2 import TemplateError

from data.test_tools import FAMILIES
from luthier.data.chat_template import names_read, render_template

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <short> & "clear".'},
    {"role": "user", "content": 'What is it like in "Łódź"?', "name": None},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "A town.",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2.5}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"sky": "clear"}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Clear."},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


class Kind(str, Enum):  # noqa: UP042 - of which str() gives the name
    A = "a kind"


class Two(NamedTuple):
    first: str


def rendered(render: Any) -> str:
    try:
        return str(render())
    except (TemplateError, TypeError, ValueError) as error:
        return type(error).__name__


def theirs(template: str, turns: Any, tools: Any = None, reply: bool = False, **names: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
    return render_jinja_template(
        [plain], tools, chat_template=template, add_generation_prompt=reply, **names
    )[0][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_of_families_are_rendered_alike(family: str, count: int, tools: Any) -> None:
    template, names = FAMILIES[family].template, {"bos_token": "<s>", "eos_token": "</s>"}
    for turns in (TURNS[:count], TURNS[1:count] or TURNS[1:2]):
        for reply in (True, False):
            expected = rendered(lambda: theirs(template, turns, tools, reply, **names))  # noqa: B023
            found = rendered(lambda: render_template(template, turns, tools, reply, names))  # noqa: B023
            assert found == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}",
        "{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}",
        "{% for m in messages %}\n  {% if loop.last %}{% break %}{% endif %}\n{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now(format='%Y') }}",
        "{{ kind }}{{ share + 1 }}{{ two.first }}",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.a = 3 %}{{ ns.a + ns.self }}",
        "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['b'], 2) | tojson }}",
        "{{ thing }}{{ number + 1 }}{{ pair[1] }}{{ tools is none }}{{ documents is none }}",
        "{{ messages[9].content }}",
        "{{ 'x' if messages[2].thinking == messages[2].reasoning_content }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_templates_use_is_there(template: str) -> None:
    names = {
        "thing": object(), "number": 2, "pair": (1, "two"), "kind": Kind.A,
        "share": np.float32(0.5), "two": Two("a"),
    }  # fmt: skip
    expected = rendered(lambda: theirs(template, TURNS, **names))
    assert rendered(lambda: render_template(template, TURNS, None, False, names)) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    """What it may not see is undefined: one step shows nothing, and a second one is refused."""
    shown = rendered(lambda: render_template(template, TURNS, None, False, {}))
    assert shown == rendered(lambda: theirs(template, TURNS))
    assert shown in ("", "SecurityError", "UndefinedError")


def test_a_template_sees_copies(tmp_path: Any) -> None:
    class Text(str):
        def leave(self) -> str:
            return "left"

    turns = [{"role": "user", "content": Text("a"), "more": tmp_path}]
    assert render_template("{{ messages[0].content }}", turns, None, False, {}) == "a"
    with pytest.raises(TemplateError):
        render_template("{{ messages[0].content.leave() }}", turns, None, False, {})
    shown = render_template("{{ messages[0].more }}", turns, None, False, {})
    assert shown == f"<{type(tmp_path).__name__}>"
    with pytest.raises(ValueError, match="at least one message"):
        render_template("", [], None, False, {})


def test_what_is_constant_is_not_computed_to_read_names() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinja2.nodes.BinExpr.as_const", lambda *_: pytest.fail("it was computed"))
        assert names_read("{{ a }}{% if false %}{{ 'a' * 3000000000 }}{% endif %}") == {"a"}


def test_names_that_a_template_reads() -> None:
    assert names_read("{{ a }}{% set b = 1 %}{{ b }}{{ raise_exception('') }}") == {"a"}
    assert names_read("{% if") == frozenset()
