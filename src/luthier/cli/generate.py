"""``luthier generate`` and ``luthier chat``."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import (
    check_json_lines,
    check_output,
    heavy_imports,
    is_standard_output,
    note,
    print_json,
    print_text,
    print_written,
    stream_reasoning,
    stream_text,
    write_json,
)
from luthier.cli.options import (
    Columns,
    InferenceProcesses,
    Json,
    Overwrite,
    RayAddress,
    RayGpus,
    with_sampling,
)
from luthier.errors import DataError, Problem, RecipeError, RefusedInput
from luthier.files import read_text

if TYPE_CHECKING:
    from luthier.data.parsing import Record
    from luthier.inference.generation import Generator, Prompt
    from luthier.models.sampling import Sampling
    from luthier.types import Message
    from luthier.workflows.inference_tasks import InputRow

Model = Annotated[str, typer.Argument(help="Model id, local directory or hub id.")]
ReplyTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a reply at most; 256, or half of a smaller context.", min=1),
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]


@with_sampling
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="Many: a file of prompts or messages in any form of rows (of .txt each line is one).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of the same rows, each with its `completion`; its own is `expected`. "
            "- for standard output."
        ),
    ] = None,
    columns: Columns = None,
    schema: Annotated[
        Path | None, typer.Option(help="File of a JSON schema that each reply matches.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole of each reply matches.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File of a grammar in Lark that each reply matches.")
    ] = None,
    overwrite: Overwrite = False,
    processes: InferenceProcesses = None,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
    json_: Json = False,
    **sampling_fields: Any,
) -> None:
    """Generate replies to a prompt or a file of prompts."""
    with heavy_imports(model):
        from luthier.cli.batch_inference import BatchInference
        from luthier.data.writers import write_packed
        from luthier.inference.generation import Generator
        from luthier.library.models import check_active, find
        from luthier.models.sampling import Sampling
        from luthier.recipe import parse_columns
        from luthier.workflows.inference_tasks import (
            REASONING,
            GenerateTask,
            fitting_prompts,
            reasoning_of,
            reply_lines,
        )

    output = None if is_standard_output(output) else output
    if (prompt is None) == (input_ is None):
        raise RecipeError("give one prompt, or --input FILE with many")
    if prompt is not None and not prompt.strip():
        raise RecipeError("the prompt is empty")
    if input_ is None and (output is not None or columns):
        raise RecipeError(f"--{'map' if output is None else 'output'} goes with --input")
    sampling = Sampling(
        **sampling_fields,
        schema=None if schema is None else _read_schema(schema),
        regex=regex,
        grammar=None if grammar is None else read_text(grammar),
    )
    check_json_lines(output)
    check_output(output, input_, overwrite=overwrite)
    task = GenerateTask(
        model=model,
        source=str(input_),
        columns=parse_columns(columns),
        sampling=sampling,
    )
    batch = BatchInference.of_options(input_, output, processes, ray_address, ray_gpus)
    if batch is not None:
        stored = check_active(find(model, is_able=Generator.is_able))
        Generator.check(stored)
        found, report = batch.answer(replace(task, model=stored.id))
        if json_:
            print_json(report)
        else:
            print_written(found.rows, "replies", batch.output)
        return
    rows: list[InputRow] = []
    records: list[Record] = []
    if input_ is not None:
        problems: list[Problem] = []
        rows = [*task.rows(problems)]
        if problems:
            raise DataError(problems)
        records = task.records(rows)
    with heavy_imports():
        from luthier.cli.progress import show_progress

        stored = check_active(find(model, is_able=Generator.is_able))
        generator = Generator.open(stored)
    if input_ is None:
        if json_:
            (answer,) = generator.answers([prompt or ""], sampling)
            completion = {"completion": answer.text, **reasoning_of(answer)}
            print_json({"model": model, "prompt": prompt, **completion})
            return
        _write_reply(generator, prompt or "", sampling)
        return
    started = time.monotonic()
    with show_progress(len(rows), "generate") as done:
        prompts = fitting_prompts(rows, generator, sampling)
        answers = generator.answers(prompts, sampling, done=done)
    text = reply_lines(records, answers)
    if output is not None:
        write_packed(output, text.encode())
    elif not json_:
        write_json(text)
    if json_:
        report = {"rows": len(answers), "seconds": time.monotonic() - started}
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


def _write_reply(generator: Generator, prompt: Prompt, sampling: Sampling) -> Message:
    """Write a reply as it is decoded, and say on standard error where the limit cut it off.

    What the model thinks before stands on standard error, too.
    """
    from luthier.types import Message

    thoughts: list[str] = []

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
    return Message("assistant", reply, reasoning="".join(thoughts))


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error


CHAT_HELP = "An empty line starts anew, /exit or Ctrl-D ends."


def chat(
    model: Model,
    max_tokens: ReplyTokens = None,
    temperature: Temperature = 0.0,
) -> None:
    """Chat with a model.

    An empty line starts a new conversation, /exit or Ctrl-D ends the program.
    """
    with heavy_imports(model):
        from luthier.inference.derived_gguf import check_derivable
        from luthier.inference.generation import Generator
        from luthier.library.models import check_active, find
        from luthier.models.backends import chosen_backend
        from luthier.models.sampling import Sampling
        from luthier.types import Message

        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        stored = check_active(find(model, is_able=Generator.is_able))
        generator = Generator.open(stored)
    several = generator.chat.template == "chat"
    print_text(f"{model} is ready. {CHAT_HELP}")
    if generator.backend.device.type == "cpu" and chosen_backend().id == "torch":
        with suppress(RefusedInput):
            check_derivable(stored)
            note(
                "Backend: torch. Without a GPU, llama.cpp may be faster: set LUTHIER_BACKEND=llama.cpp."
            )
    history: list[Message] = []
    while True:
        try:
            text = input("\nyou > ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if text.strip() in ("/exit", "/quit", "/bye"):  # as chats of other software end
            return
        if re.fullmatch(r"/[\w?]*", text.strip()):
            print_text(f"{text.strip()} is no command. {CHAT_HELP}")
            continue
        if not text.strip():
            history = []
            continue
        history = [*history, Message("user", text)] if several else [Message("user", text)]
        history.append(_write_reply(generator, history, sampling))
