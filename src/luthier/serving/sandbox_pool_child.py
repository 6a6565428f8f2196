"""The process in which graders of clients compare texts, and their schemas and grammars are tried.

Texts, patterns, schemas and grammars that a client sends can be written to take all time and memory
there is, and most libraries that work on them know no limit. This process has some
(:mod:`luthier.serving.sandboxed_process_child`); :mod:`luthier.serving.sandbox_pool` asks it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.data.shapes.conversations import PromptOnly
from luthier.serving.memory import allocated_bytes
from luthier.serving.sandboxed_process_child import be_killed_first, limit_memory, serve

NICE = 5
"""Requests that are answered by the server itself go first."""

GRAMMAR_BYTES = 8 << 20
"""Memory that a compiled grammar may take. 2,000 texts to choose from take 1 MB, 100 fields 0.4,
``{"type": "integer", "multipleOf": 99991}`` 44; 4,000 fields 15, and 1.4 seconds."""
STACK_BYTES = 2 << 20
"""Of the thread that tries a grammar: rules that name rules are read by functions that call themselves,
some 3 kB each, and what passes here has to pass in a thread of the server, which has 8 MiB."""


def main(arguments: list[str]) -> None:
    """Answer requests within ``seconds`` and ``memory`` bytes each, until none comes in time."""
    descriptor, seconds, memory, idle_seconds = arguments
    connection = socket.socket(fileno=int(descriptor))
    be_killed_first()
    os.nice(NICE)
    _import()
    limit_memory(int(memory))

    def describe_error(error: Exception) -> str:
        if isinstance(error, MemoryError):
            return f"this takes more than {int(memory) >> 20} MiB of memory"
        return f"this fails: {type(error).__name__}: {str(error)[:300]}"

    serve(
        connection,
        {},
        int(seconds),
        lambda call, given: _CALLS[call](**given),
        describe_error,
        float(idle_seconds),
    )


def _import() -> None:
    """All that is needed later, while files can still be opened."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from luthier.graders import StringCheck, TextSimilarity

    # What graders import when they first compare texts.
    for grader in (TextSimilarity(reference="a"), StringCheck(reference="a")):
        _grade(grader.model_dump(), [{"reply": "a", "members": {}, "text_characters": 1000}])
    with contextlib.suppress(ImportError):
        _grammar('{"grammars": []}')


def _grade(grader: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of ``answers``, and why some have none."""
    from dataclasses import astuple

    from luthier.graders import Answer, Grader, grader_from
    from luthier.graders.grade import attempt

    made: Grader = grader_from(grader)
    several = [
        Answer(
            (),
            each["reply"],
            None,
            PromptOnly("item", 1, "", members=each["members"]),
            each["text_characters"],
        )
        for each in answers
    ]
    try:
        return {"scores": made.grade(several), "troubles": []}
    except MemoryError:
        raise  # a limit of this process, and no fault of the row
    except Exception:
        scores, troubles = attempt(made, several)
    return {"scores": scores, "troubles": [[i, *astuple(each)] for i, each in troubles.items()]}


def _grammar(grammar: str) -> str:
    """Why answers cannot be kept to a grammar; empty where they can.

    Tried with bytes as tokens: what a grammar takes to be read does not depend on the vocabulary.
    """
    found: list[str | Exception] = []

    def attempt() -> None:
        try:
            found.append(_grammar_error(grammar))
        except Exception as error:
            found.append(error)

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _grammar_error(grammar: str) -> str:
    from llguidance import LLMatcher, LLTokenizer

    before = allocated_bytes()
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return str(matcher.get_error())
    size = allocated_bytes() - before
    if size > GRAMMAR_BYTES:
        took, most = f"{size / (1 << 20):.0f} MiB", f"{GRAMMAR_BYTES >> 20} MiB"
        return f"it takes {took} of memory; at most {most} are allowed. Use a simpler one."
    return ""


_CALLS: dict[str, Callable[..., Any]] = {"grade": _grade, "grammar": _grammar}


if __name__ == "__main__":
    main(sys.argv[1:])
