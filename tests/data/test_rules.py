"""An example of each data rule, and the completeness of the list."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from rule_examples import EXAMPLES, WHOLE_FILE
from written_rows import problems_of, write

from luthier.data import character_spans, formats, prompts, rows, shapes, unread
from luthier.data import field_checks as fields
from luthier.data.conversations import content_parts, tool_forms
from luthier.data.files import (
    containers,
    interactions,
    json_files,
    line_forms,
    nested,
    parsing,
    read,
    s3,
    sources,
    tables,
)
from luthier.data.rules import PREFERENCE_RULES, PROMPT_RULES, RULES
from luthier.gate.rules import DOUBTS
from luthier.media import files as media_files
from luthier.media import time_series


@pytest.mark.parametrize(("rule", "records", "line"), EXAMPLES)
def test_rule(folder: Path, rule: str, records: list[object], line: int) -> None:
    found = [p for p in problems_of(write(folder, *records)) if p.rule == rule]
    assert [p.line for p in found] == [line] and found[0].advice


# Rules about whole files, tested in test_read.py.
def test_unreadable_paths_are_data_errors(folder: Path) -> None:
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "table.bin").write_bytes(b"one,two\n")
    (folder / "empty").mkdir(exist_ok=True)
    names = {"no.jsonl": "missing", "empty": "directory", "loop.jsonl": "unreadable"}
    for name, rule in {**names, "table.bin": "unknown_format"}.items():
        found = [(p.line, p.rule) for p in problems_of(folder / name)]
        assert found == [(0, f"file.{rule}")]
        assert f"file.{rule}" in WHOLE_FILE


def test_every_rule_is_listed_used_and_shown_by_an_example() -> None:
    used = set()
    modules = (
        read,
        rows,
        character_spans,
        containers,
        content_parts,
        json_files,
        fields,
        formats,
        interactions,
        line_forms,
        media_files,
        nested,
        parsing,
        prompts,
        s3,
        *(
            import_module(each.name)
            for each in iter_modules(shapes.__path__, f"{shapes.__name__}.")
        ),
        sources,
        tables,
        time_series,
        tool_forms,
        unread,
    )
    for module in modules:
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in tree.body:
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            used |= {t for t in texts if isinstance(t, str) and re.fullmatch(r"[a-z]+\.\w+", t)}
    used -= {"convert.form", "convert.media"}  # of rows that `luthier convert` cannot write
    # Rules of graders, objectives and input formats.
    gathered = {"grader.no_reference", "thumb.one_kind", "media.base"}
    assert used == {*RULES, *PREFERENCE_RULES, *PROMPT_RULES, *DOUBTS} - gathered
    assert {rule for rule, *_ in EXAMPLES} | WHOLE_FILE == set(RULES)
    assert all(text.endswith(".") and "\n" not in text for text in RULES.values())
