"""``luthier generate``, ``chat`` and ``evaluate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from luthier.cli.console import (
    check_output,
    counting,
    heavy_imports,
    note,
    print_json,
    print_text,
    stream_text,
    wrote,
)
from luthier.errors import DataError, Problem, RecipeError, data_errors
from luthier.printable import printable_json
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.graders import Grader, OnError
    from luthier.serving.long_rows import LongRows
    from luthier.store.models import StoredModel
    from luthier.types import Row


def generate(
    model_id: str,
    prompt: str | None,
    source: Path | None,
    target: Path | None,
    sampling: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Answer one prompt, streaming to standard output, or a file of them."""
    from luthier.serving.generation import Generator, Sampling
    from luthier.store.models import find

    if (prompt is None) == (source is None):
        raise RecipeError("give one prompt, or --input FILE with many")
    if target is not None and source is None:
        raise RecipeError("--output goes with --input")
    chosen = Sampling(**sampling)
    check_output(target)
    prompts = _read_prompts(source) if source else []
    with heavy_imports():
        generator = Generator.open(find(model_id))
    if source is not None:
        _generate_file(generator, prompts, chosen, target, as_json)
    elif as_json:
        completion = "".join(generator.stream(prompt or "", chosen))
        print_json({"model": model_id, "prompt": prompt, "completion": completion})
    else:
        for piece in generator.stream(prompt or "", chosen):
            stream_text(piece)
        sys.stdout.write("\n")


def _generate_file(
    generator: Any, prompts: Sequence[Any], sampling: Any, target: Path | None, as_json: bool
) -> None:
    from luthier.files import write_bytes

    started = time.monotonic()
    with counting(len(prompts), "generate", as_json) as done:
        asked = [p if isinstance(p, str) else [Message(**turn) for turn in p] for p in prompts]
        replies = generator.replies(asked, sampling, done=done)
    lines = [
        json.dumps({"prompt": prompt, "completion": reply}, ensure_ascii=False) + "\n"
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    if target is not None:
        write_bytes(target, "".join(lines).encode())
    elif not as_json:
        sys.stdout.write(printable_json("".join(lines)))
    if as_json:
        report: dict[str, Any] = {"rows": len(replies), "seconds": time.monotonic() - started}
        report |= {"output": str(target)} if target else {"completions": replies}
        print_json(report)
    elif target is not None:
        wrote(len(replies), "replies", target)


@data_errors("nothing was answered")
def _read_prompts(source: Path) -> list[Any]:
    """Prompts of a JSONL file: texts under ``prompt``, or lists of messages; other keys are free."""
    from luthier.data.read import read_records

    problems: list[Problem] = []
    prompts: list[Any] = []

    def refuse(line: int, rule: str, message: str, fix: str) -> None:
        problems.append(Problem(str(source), line, rule, message, fix))

    for line, record in read_records(source, problems):
        prompt, messages = record.get("prompt"), record.get("messages")
        if isinstance(prompt, str) and prompt.strip():
            prompts.append(prompt)
        elif _asks(messages):
            while messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            prompts.append([{k: turn[k] for k in ("role", "content")} for turn in messages])
        else:
            refuse(
                line,
                "prompt.missing",
                "the row has neither a text under `prompt` nor a list of `messages`.",
                'Write {"prompt": "…"} on each line.',
            )
    if not prompts and not problems:
        refuse(0, "file.empty", "the file has no rows.", "Give at least one prompt.")
    if problems:
        raise DataError(problems)
    return prompts


def _asks(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether these are turns, one of them at least not the assistant's."""
    return (
        isinstance(messages, list)
        and all(map(_is_turn, messages))
        and any(turn["role"] != "assistant" for turn in messages)
    )


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


def chat(model_id: str, sampling: Mapping[str, Any]) -> None:
    """A conversation on the terminal."""
    from luthier.serving.generation import Generator, Sampling
    from luthier.store.models import find

    chosen = Sampling(**sampling)
    with heavy_imports():
        generator = Generator.open(find(model_id))
    several = generator.chat.template == "chat"
    print_text(f"{model_id} is ready. An empty line starts anew, Ctrl-D ends.")
    history: list[Message] = []
    while True:
        try:
            text = input("\nyou > ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if not text.strip():
            history = []
            continue
        history = [*history, Message("user", text)] if several else [Message("user", text)]
        reply = ""
        for piece in generator.stream(history, chosen):
            stream_text(piece)
            reply += piece
        sys.stdout.write("\n")
        history.append(Message("assistant", reply))


@data_errors("nothing was evaluated")
def evaluate(
    model_id: str,
    data: str,
    columns: Sequence[str],
    graders: Sequence[str],
    assignments: Sequence[str],
    on_error: OnError,
    max_tokens: int,
    target: Path | None,
    as_json: bool,
    long_rows: LongRows = "error",
) -> None:
    """Grade a model's replies to held-out rows."""
    from luthier.cli import predicting
    from luthier.data.rows import load_rows
    from luthier.evaluation.evaluate import check, check_shapes
    from luthier.files import write_bytes
    from luthier.recipe import parse_columns
    from luthier.serving.generation import Generator
    from luthier.serving.grading import open_graders
    from luthier.serving.long_rows import long_rows_summary
    from luthier.serving.measuring import measure
    from luthier.store.models import find, objective_of

    chosen = _graders(graders, assignments)
    check_output(target)
    rows = load_rows(data, parse_columns(columns))
    stored = find(model_id)
    objective = objective_of(stored)
    check_shapes(rows, objective)
    if objective.reads:
        predicting.evaluate(stored, data, rows, target, as_json, long_rows)
        return
    if rows and rows[0].reply is not None:
        predicting.prefer(stored, data, rows, target, as_json, long_rows)
        return
    if target is None and all(row.text is not None for row in rows):
        _perplexity(stored, rows, as_json)
        return
    check(rows, chosen)
    with heavy_imports():
        generator = Generator.open(stored)
    chosen = open_graders(chosen, len(rows), note)
    started = time.monotonic()
    with counting(len(rows), "evaluate", as_json) as done:
        result = measure(generator, rows, chosen, max_tokens, done, on_error, long_rows)
    if text := long_rows_summary(result):
        note(text)
    seconds = time.monotonic() - started
    if target is not None:
        fields = ("prompt", "reply", "expected", "scores")
        lines = [{name: getattr(answer, name) for name in fields} for answer in result.answers]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(target, text.encode())
    if as_json:
        print_json({"model": model_id, **result.plain(), "seconds": seconds})
    else:
        for name, score in result.scores.items():
            sys.stdout.write(f"{name}: {score:.2%} of {result.rows} rows ({seconds:.0f} s)\n")
        for problem in result.problems[:5]:
            print_text(f"scored 0: {problem}")
        if result.problems:
            sys.stdout.write(f"{len(result.problems)} replies could not be graded and score 0\n")
        if target is not None:
            wrote(len(result.answers), "answers", target)


def _graders(given: Sequence[str], assignments: Sequence[str]) -> dict[str, Grader]:
    """Graders by name or from TOML files, with fields from ``NAME.FIELD=VALUE``."""
    from luthier.graders import Spec, graders_named, read_graders
    from luthier.recipe import set_field

    specs: dict[str, Spec] = {}
    for name in given:
        specs |= read_graders(Path(name)) if name.endswith(".toml") else {name: name}
    for assignment in assignments:
        if assignment.partition("=")[0].partition(".")[0].strip() not in specs:
            raise RecipeError(
                f"--set takes GRADER.FIELD=VALUE of one of {', '.join(specs)}; got {assignment!r}"
            )
        set_field(specs, assignment)
    return graders_named(specs)


def _perplexity(stored: StoredModel, rows: Sequence[Row], as_json: bool) -> None:
    """Raw text has no replies to grade: how well is each token predicted?"""
    from luthier.serving.measuring import perplexity

    started = time.monotonic()
    with heavy_imports():
        found = perplexity(stored, rows).plain()
    seconds = time.monotonic() - started
    if as_json:
        print_json({"model": stored.id, "rows": len(rows), **found, "seconds": seconds})
        return
    for name, score in found["scores"].items():
        sys.stdout.write(f"{name}: {score:.4f}\n")
    sys.stdout.write(f"{found['tokens']:,} tokens of {len(rows)} texts in {seconds:.0f} s\n")
