"""``luthier generate`` and ``luthier chat``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from luthier.cli.console import (
    check_output,
    heavy_imports,
    print_json,
    print_text,
    print_written,
    stream_reasoning,
    stream_text,
)
from luthier.cli.options import Json, Speculation
from luthier.errors import DataError, Problem, RecipeError, data_errors
from luthier.files import read_text, write_bytes
from luthier.printable import printable_json

if TYPE_CHECKING:
    from luthier.models.sampling import Sampling
    from luthier.models.speculation import Speculation as SpeculationCounts
    from luthier.serving.generation import GeneratedReply, Generator, Prompt
    from luthier.types import Message

Model = Annotated[str, typer.Argument(help="Model id, local directory or hub id.")]
ReplyTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a reply at most; 256, or half of a smaller context.", min=1),
]
REASONING = "reasoning"
"""Key of what a model thought before its completion, in what is printed and written."""
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="JSONL of prompts or messages to answer.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of the same rows, each with its `completion`; its own is `expected`."
        ),
    ] = None,
    max_tokens: ReplyTokens = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    schema: Annotated[
        Path | None, typer.Option(help="File of a JSON schema that each reply matches.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole of each reply matches.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File of a grammar in Lark that each reply matches.")
    ] = None,
    speculation: Speculation = "ngram",
    json_: Json = False,
) -> None:
    """Answer one prompt, streaming, or a file of prompts."""
    from luthier.models.sampling import Sampling
    from luthier.serving.generation import Generator
    from luthier.store.models import check_active, find
    from luthier.types import Message

    if (prompt is None) == (input_ is None):
        raise RecipeError("give one prompt, or --input FILE with many")
    if prompt is not None and not prompt.strip():
        raise RecipeError("the prompt is empty")
    if output is not None and input_ is None:
        raise RecipeError("--output goes with --input")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        schema=None if schema is None else _read_schema(schema),
        regex=regex,
        grammar=None if grammar is None else read_text(grammar),
    )
    check_output(output)
    rows = _read_prompts(input_) if input_ else []
    prompts = [prompt for prompt, _ in rows]
    with heavy_imports():
        from luthier.cli.progress import show_progress

        stored = check_active(find(model, is_able=Generator.is_able))
        generator = Generator.open(stored, speculation)
    if input_ is None:
        if json_:
            (answer,) = generator.answers([prompt or ""], sampling)
            completion = {"completion": answer.text, **_reasoning_of(answer)}
            guesses = _draft_report(generator)
            print_json({"model": model, "prompt": prompt, **completion, **guesses})
            return
        _write_reply(generator, prompt or "", sampling)
        return
    started = time.monotonic()
    with show_progress(len(prompts), "generate") as done:
        questions = [p if isinstance(p, str) else [Message(**turn) for turn in p] for p in prompts]
        answers = generator.answers(questions, sampling, done=done)
    lines = [
        {"prompt": prompt, "completion": answer.text, **beside, **_reasoning_of(answer)}
        for (prompt, beside), answer in zip(rows, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output is not None:
        write_bytes(output, text.encode())
    elif not json_:
        sys.stdout.write(printable_json(text))
    if json_:
        report: dict[str, Any] = {"rows": len(answers), "seconds": time.monotonic() - started}
        report |= _draft_report(generator)
        if output:
            report["output"] = str(output)
        else:
            report["completions"] = [answer.text for answer in answers]
            if any(answer.reasoning for answer in answers):
                report[REASONING] = [answer.reasoning for answer in answers]
        print_json(report)
        return
    if output is not None:
        print_written(len(answers), "replies", output)
    _print_draft(generator, generator.speculation)


def _reasoning_of(answer: GeneratedReply) -> dict[str, str]:
    """The reasoning under its key, where there is some."""
    return {REASONING: answer.reasoning} if answer.reasoning else {}


def _draft_report(generator: Generator) -> dict[str, Any]:
    """How well a draft model guessed all that was written, where there is one."""
    if generator.draft_model is None:
        return {}
    found = generator.speculation
    return {
        "draft_model": generator.draft_model,
        "draft_proposed": found.draft_proposed,
        "draft_accepted": found.draft_accepted,
        "draft_skipped": found.draft_skipped,
    }


def _print_draft(generator: Generator, found: SpeculationCounts) -> None:
    """Say on standard error how well a draft model guessed, where there is one."""
    if generator.draft_model is None:
        return
    rate = found.draft_acceptance_rate
    text = f"draft model {generator.draft_model}: "
    if rate is None:
        text += "no guesses"
    else:
        text += f"{found.draft_accepted} of {found.draft_proposed} guesses accepted ({rate:.0%})"
    if found.draft_skipped:
        text += f"; {found.draft_skipped} tokens written without it, as it did not pay"
    typer.echo(f"({text})", err=True)


def _write_reply(generator: Generator, prompt: Prompt, sampling: Sampling) -> Message:
    """Write a reply as it is decoded, and say on standard error where the limit cut it off.

    What the model thinks before stands on standard error, too.
    """
    from luthier.types import Message

    thoughts: list[str] = []
    before = generator.speculation

    def show_reasoning(piece: str) -> None:
        thoughts.append(piece)
        stream_reasoning(piece)

    pieces = generator.stream(prompt, sampling, show_reasoning)
    reply, finished = "", False
    while True:
        try:
            piece = next(pieces)
        except StopIteration as ended:
            finished = ended.value
            break
        if thoughts and not reply:
            typer.echo("\n", err=True)
        stream_text(piece)
        reply += piece
    sys.stdout.write("\n")
    if not finished:
        typer.echo("(cut off: --max-tokens allows more)", err=True)
    _print_draft(generator, generator.speculation - before)
    return Message("assistant", reply, reasoning="".join(thoughts))


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error


@data_errors("nothing was answered")
def _read_prompts(source: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Prompts of a JSONL file, texts under ``prompt`` or lists of messages, and their other fields.

    A reply that a row has already is its ``expected`` one.
    """
    from luthier.data.read import read_records

    problems: list[Problem] = []
    prompts: list[tuple[Any, dict[str, Any]]] = []
    for line, record in read_records(source, problems):
        prompt, messages = record.pop("prompt", None), record.get("messages")
        reply = record.pop("completion", None)
        if isinstance(prompt, str) and prompt.strip():
            pass
        elif _are_turns(messages):
            del record["messages"]
            while messages[-1]["role"] == "assistant":
                reply, messages = messages[-1]["content"], messages[:-1]
            prompt = [{k: turn[k] for k in ("role", "content")} for turn in messages]
        else:
            problems.append(
                Problem(
                    str(source),
                    line,
                    "prompt.missing",
                    "the row has neither a text under `prompt` nor a list of `messages`.",
                    'Write {"prompt": "…"} on each line.',
                )
            )
            continue
        prompts.append((prompt, record if reply is None else {"expected": reply, **record}))
    if not prompts and not problems:
        rule, message, fix = "file.empty", "the file has no rows.", "Give at least one prompt."
        problems.append(Problem(str(source), 0, rule, message, fix))
    if problems:
        raise DataError(problems)
    return prompts


def _are_turns(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether these are turns, one of them at least not the assistant's."""
    return (
        isinstance(messages, list)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in messages
        )
        and any(turn["role"] != "assistant" for turn in messages)
    )


def chat(
    model: Model,
    max_tokens: ReplyTokens = None,
    temperature: Temperature = 0.0,
    speculation: Speculation = "ngram",
) -> None:
    """Talk to a model. An empty line starts anew, Ctrl-D ends."""
    from luthier.models.sampling import Sampling
    from luthier.serving.generation import Generator
    from luthier.store.models import check_active, find
    from luthier.types import Message

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    with heavy_imports():
        stored = check_active(find(model, is_able=Generator.is_able))
        generator = Generator.open(stored, speculation)
    several = generator.chat.template == "chat"
    print_text(f"{model} is ready. An empty line starts anew, Ctrl-D ends.")
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
        history.append(_write_reply(generator, history, sampling))
