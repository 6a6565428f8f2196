"""``luthier generate`` and ``luthier chat``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.documents import doubt, fit_passages, open_retriever, show_sources
from luthier.cli.inference.batch_inference import RowAnswers, RowProcesses, answer_rows
from luthier.cli.terminal.bridge import KeywordOptions
from luthier.cli.terminal.console import (
    check_json_lines,
    check_output,
    heavy_imports,
    is_standard_output,
    note,
    print_text,
    print_written,
    stream_reasoning,
    stream_text,
    write_json,
)
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne, RayAddress
from luthier.errors import RecipeError
from luthier.files import read_text
from luthier.models.decoding.sampling import MOST_TOKENS, Sampling, limited_fields

if TYPE_CHECKING:
    from luthier.documents.answers import Citations
    from luthier.documents.retriever import Retriever
    from luthier.engine.metrics import Reporter
    from luthier.inference.generation import Generator, Prompt
    from luthier.types import Message

SAMPLING = KeywordOptions(
    {
        name: Annotated[
            kind, typer.Option(help=text, min=low, max=high if high < MOST_TOKENS else None)
        ]
        for name, (kind, (low, high, text)) in limited_fields(Sampling).items()
    },
    {name: getattr(Sampling, name) for name in limited_fields(Sampling)},
)
"""Options for the bounded fields of :class:`Sampling`."""


@dataclass(frozen=True)
class PendingReply:
    """Reply to one prompt, generated when printed."""

    model: str
    prompt: Prompt
    generator: Generator
    sampling: Sampling
    text: str

    def plain(self) -> dict[str, Any]:
        """Generate the reply and return JSON values."""
        from luthier.workflows.inference_tasks import reasoning_of

        (answer,) = self.generator.answers([self.prompt], self.sampling)
        found = {"model": self.model, "prompt": self.text, "completion": answer.text}
        return {**found, **reasoning_of(answer)}


def generate(
    model: str,
    prompt: str | None = None,
    *,
    system: str | None = None,
    image: list[Path] | None = None,
    input: str | None = None,
    output: Path | None = None,
    columns: Mapped = None,
    schema: Path | None = None,
    regex: str | None = None,
    grammar: Path | None = None,
    overwrite: bool = False,
    processes: OptionalAtLeastOne = None,
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    reporter: Reporter | None = None,
    **sampling: Annotated[Any, SAMPLING],
) -> PendingReply | RowAnswers:
    """Generate replies to a prompt or a file of prompts.

    Each row of the result has the reply as ``completion``, and the reply of the file as ``expected``.
    With --processes or --ray-address, several processes share the rows, and the same command resumes
    after an interruption.

    Args:
        model: Model id, local directory or hub id.
        prompt: The prompt.
        system: System message before the prompt.
        image: Image before the prompt; repeatable.
        input: File of prompts or conversations, instead of a prompt.
        output: File for the result (JSONL); standard output by default.
        columns: Column of a key, e.g. prompt=question; repeatable.
        schema: File with a JSON schema for the reply.
        regex: Regular expression for the whole reply.
        grammar: File with a Lark grammar for the reply.
        overwrite: Replace an existing file.
        processes: Processes that share the rows of a file.
        ray_address: Head of a Ray cluster that runs the processes.
        ray_gpus: GPUs that each process reserves on a node.
        reporter: Receives progress; silent if not given.
        **sampling: Fields of :class:`luthier.models.decoding.sampling.Sampling`.

    Returns:
        The reply to the prompt, or the replies to the rows.

    Raises:
        RefusedInput: for unreadable rows, or a prompt that leaves too little room for a reply.
    """
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.inference.generation import Generator
        from luthier.inference.opened_model import backend_for_one
        from luthier.library.models import check_active, find
        from luthier.workflows.inference_tasks import GenerateTask

    reporter = reporter or Reporter()
    output = None if is_standard_output(output) else output
    if (prompt is None) == (input is None):
        raise RecipeError("a prompt is missing: name a prompt or --input FILE, not both")
    if prompt is not None and not prompt.strip():
        raise RecipeError("the prompt is empty")
    if image and prompt is None:
        raise RecipeError("--image needs a prompt. Write images of --input into its messages")
    if system and prompt is None:
        raise RecipeError("--system needs a prompt. Write system messages of --input into its rows")
    if input is None and (output is not None or columns):
        raise RecipeError(f"--{'map' if output is None else 'output'} needs --input")
    chosen = Sampling(
        **sampling,
        schema=None if schema is None else _read_schema(schema),
        regex=regex,
        grammar=None if grammar is None else read_text(grammar),
    )
    check_json_lines(output)
    check_output(output, input, overwrite=overwrite)
    shared = RowProcesses(processes, ray_address, ray_gpus)
    if shared.check(input, output) and output is not None:
        stored = check_active(find(model, is_able=Generator.is_able))
        Generator.check(stored)
        task = GenerateTask(
            model=stored.id, source=str(input), columns=columns or {}, sampling=chosen
        )
        return shared.answer(task, output, reporter)
    if input is not None:
        task = GenerateTask(model=model, source=input, columns=columns or {}, sampling=chosen)
        with heavy_imports():
            return answer_rows(task, output, reporter)
    with heavy_imports():
        stored = check_active(find(model, is_able=Generator.is_able))
        Generator.check(stored)
        backend, reason = backend_for_one(stored, write=False)
        if backend.id != "torch":
            note(f"Backend: {backend.id}, {reason}")
        generator = Generator.open(stored, backend)
    text = prompt or ""
    turns = _turns(text, image or [], system)
    return PendingReply(model, turns, generator, chosen, text)


def _turns(text: str, paths: list[Path], system: str | None) -> list[Message]:
    """Return a user turn with images before the text, after the system message."""
    from luthier.data.inputs import Media
    from luthier.types import IMAGE_MARK, Message

    for path in paths:
        if not path.is_file():
            raise RecipeError(
                f'the image "{path}" does not exist.', advice="Give the path of a local file."
            )
    images = tuple(Media("image", str(path), str(path)) for path in paths)
    turn = Message("user", IMAGE_MARK * len(images) + text, images=images)
    return [Message("system", system), turn] if system else [turn]


def show_replies(found: PendingReply | RowAnswers) -> None:
    """Print the reply during generation, or the replies to the rows of a file."""
    if isinstance(found, PendingReply):
        _write_reply(found.generator, found.prompt, found.sampling)
    elif found.output is None:
        write_json(found.lines)
    else:
        print_written(found.rows, "replies", found.output)


def _write_reply(
    generator: Generator, prompt: Prompt, sampling: Sampling, citations: Citations | None = None
) -> Message:
    """Print a reply during generation; reasoning and a reached limit go to standard error.

    ``citations`` removes unknown citations.
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
        if citations is not None:
            piece, _ = citations.add(piece)
        if thoughts and not reply:
            typer.echo("\n", err=True)
        stream_text(piece)
        reply += piece
    if citations is not None:
        piece, _ = citations.add("", last=True)
        stream_text(piece)
        reply += piece
    sys.stdout.write("\n")
    if not finished:
        typer.echo("(truncated: increase --max-tokens)", err=True)
    return Message("assistant", reply, reasoning="".join(thoughts))


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from error


CHAT_HELP = "An empty line starts a new conversation, /exit or Ctrl-D ends the chat."


def chat(
    model: str,
    *,
    system: str | None = None,
    max_tokens: OptionalAtLeastOne = None,
    temperature: float = 0.0,
    index: str | None = None,
) -> None:
    """Chat with a model.

    An empty line starts a new conversation, /exit or Ctrl-D ends the program.

    Args:
        model: Model id, local directory or hub id.
        system: System message of each conversation.
        max_tokens: Token limit of a reply.
        temperature: Sampling temperature.
        index: Index of documents for the answers (luthier index add).
    """
    with heavy_imports():
        from luthier.inference.generation import Generator
        from luthier.inference.opened_model import backend_for_one
        from luthier.library.models import check_active, find
        from luthier.types import Message

        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        stored = check_active(find(model, is_able=Generator.is_able))
        Generator.check(stored)
        backend, reason = backend_for_one(stored, write=True)
        note(f"Backend: {backend.id}, {reason}")
        generator = Generator.open(stored, backend)
    # A model without a chat template continues text, and would continue the earlier turns.
    several = generator.chat.template.kind == "chat"
    opening = [Message("system", system)] if system else []
    with open_retriever(index) if index else nullcontext() as retriever:

        def reply(turns: Sequence[Message]) -> Message:
            if retriever is None:
                return _write_reply(generator, turns, sampling)
            return _answer_from(retriever, generator, turns, sampling)

        if index and (remark := doubt(stored)):
            note(remark)
        print_text(f"{model} is ready. {CHAT_HELP}")
        _converse(opening, several, reply)


def _converse(
    opening: list[Message], several: bool, reply: Callable[[Sequence[Message]], Message]
) -> None:
    """Read messages until the end, and add the replies to the conversation."""
    from luthier.types import Message

    history = opening
    while True:
        try:
            text = input("\nyou > ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if text.strip() in ("/exit", "/quit", "/bye"):  # as in other chat programs
            return
        if re.fullmatch(r"/[\w?]*", text.strip()):
            print_text(f"Unknown command {text.strip()}. {CHAT_HELP}")
            continue
        if not text.strip():
            history = opening
            continue
        history = [*(history if several else opening), Message("user", text)]
        history.append(reply(history))


def _answer_from(
    retriever: Retriever, generator: Generator, turns: Sequence[Message], sampling: Sampling
) -> Message:
    """Print the answer to the last turn from the documents, then the sources."""
    from luthier.data.conversations.citations import DECLINED
    from luthier.documents.answers import PASSAGES, Citations, DocumentAnswer, search_text
    from luthier.types import Message

    question = turns[-1].content
    found, may_answer = retriever.search(search_text(turns), PASSAGES)
    if not may_answer:
        print_text(DECLINED)
        return Message("assistant", DECLINED)
    asked, passages = fit_passages(generator, turns, found, sampling)
    reply = _write_reply(generator, asked, sampling, Citations(len(passages)))
    show_sources(DocumentAnswer(question, reply.content, passages))
    return reply
