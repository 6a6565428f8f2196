"""Variables and date of a chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any

from jinja2 import Environment, TemplateError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Scope, Template
from pydantic import Field, PlainValidator

from luthier.data.files.parsing import quote
from luthier.errors import RecipeError

DATE = "strftime_now"
"""Name of the template function for today's date. A recipe or request sets the date under this
name, in ISO 8601: ``{"strftime_now": "2026-11-30"}``."""
_DATE_CODES = (*"aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ", *(f"-{code}" for code in "dmHIMSj"))
TEMPLATE_PARAMETERS = frozenset(
    (
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "sanitize_control_tokens",
    )
)  # fmt: skip
"""Parameters of transformers' ``apply_chat_template``; clients must not set these as variables. A
client's ``chat_template`` would run the client's own program."""


def _check_value(value: Any) -> Any:
    """Return a value for a template; dates of TOML become text. One message covers all types."""
    if isinstance(value, date):
        return value.isoformat()
    number = isinstance(value, int | float) and math.isfinite(value)
    if number or (isinstance(value, str) and len(value) <= 1000):
        return value
    raise ValueError("must be true, false, a finite number or a text of at most 1,000 characters")


TemplateSettings = Annotated[
    dict[str, Annotated[bool | int | float | str, PlainValidator(_check_value)]],
    Field(max_length=16),
]
"""``chat_template_kwargs`` of recipes and requests."""


class _GenerationTag(Extension):
    """The tag ``{% generation %}`` of transformers around the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - an attribute of instances in Jinja

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), True)).set_lineno(line)


def parse_template(template: str) -> Template:
    """Return the syntax tree of a chat template.

    Raises:
        TemplateError: if the template is not valid Jinja.
    """
    environment = Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])  # noqa: S701 - only parsed
    return environment.parse(template)


@lru_cache(maxsize=32)
def names_read(template: str) -> frozenset[str]:
    """Return the variables of a chat template without a value in the template.

    Variables that the template sets first are excluded. Empty if the template is not valid Jinja.
    """
    try:
        names = find_undeclared_variables(parse_template(template))
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(names - {"raise_exception"})


def template_defaults(values: Mapping[str, Any]) -> str:
    """Return a template prefix that sets defaults for missing variables."""
    # Jinja reads JSON literals, but no surrogate pairs, so keep non-ASCII characters.
    return "".join(
        f"{{% if {name} is not defined %}}"
        f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for name, value in values.items()
    )


def date_macro(printed: Any) -> str:
    """Return a template prefix that makes ``printed`` today's date.

    Raises:
        RecipeError: if ``printed`` is not a date in ISO 8601.
    """
    # A macro, because transformers passes only plain values to a template, no functions.
    try:
        moment = datetime.fromisoformat(printed)
        values = "".join(
            f" | replace('%{code}', {json.dumps(moment.strftime(f'%{code}'))})"
            for code in _DATE_CODES
        )
        return f"{{% macro {DATE}(format) %}}{{{{ format{values} }}}}{{% endmacro %}}"
    except (TypeError, ValueError):
        raise RecipeError(
            f"`chat_template_kwargs.{DATE}` is {quote(str(printed))}, not a date such as 2026-11-30"
        ) from None
