"""Work with limits: the same scores, and nothing that goes on when its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from luthier import child_python
from luthier.cancellation import Cancellable, cancelled_by
from luthier.data.shapes.conversations import PromptOnly
from luthier.graders import (
    Answer,
    Multi,
    PythonSource,
    StringCheck,
    TextSimilarity,
    Ungraded,
    grade_answers,
)
from luthier.serving import sandbox_pool
from luthier.serving.sandbox_pool import SandboxedGrader, SandboxPool, sandbox_grader
from luthier.serving.sandboxed_process import TakesTooMuch, WorkInterrupted

GRADERS = [
    *(TextSimilarity(reference="{{item.a}}", evaluation_metric=metric)
      for metric in ("fuzzy_match", "bleu", "gleu", "meteor", "rouge_2", "rouge_l")),
    StringCheck(reference="{{item.a}}", operation="ilike"),
]  # fmt: skip
MEMORY, LARGE_MEMORY = (256 << 20) + 4096, (1 << 30) + 4096
"""Tell the processes of these tests from those that a service of other tests left waiting."""
TEXTS = [("Paris", "Pari"), ("the cat sat", "a cat sat down"), ("", "a"), ("日本\ud800", "日\0")]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxPool]:
    made = SandboxPool(2, MEMORY, "the grader")
    yield made
    made.close()


def answer(reply: str, expected: str, characters: int = 10**7) -> Answer:
    return Answer(
        (), reply, None, PromptOnly("item", 1, prompt="", members={"a": expected}), characters
    )


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a child of another test that has ended
            if not {str(MEMORY), str(LARGE_MEMORY)}.isdisjoint(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.parametrize("grader", GRADERS, ids=lambda each: str(each))
def test_scores_are_the_same(sandbox: SandboxPool, grader: Any) -> None:
    answers = [answer(*each) for each in TEXTS]
    assert (
        grade_answers(sandbox_grader(grader, sandbox), answers).scores
        == grade_answers(grader, answers).scores
    )
    assert len(workers()) == 1


def test_refusals_are_the_same(sandbox: SandboxPool) -> None:
    grader = StringCheck(reference="{{item.b}}")
    found = []
    for each in (grader, sandbox_grader(grader, sandbox)):
        found.append(grade_answers(each, [answer("a", "a"), answer("a" * 11, "b", 10)], "zero"))
    assert found[0] == found[1]
    with pytest.raises(Ungraded, match="names something that is not there"):
        sandbox_grader(grader, sandbox).grade([answer("a", "a")])


@pytest.mark.parametrize(
    ("metric", "text"),
    [("fuzzy_match", "ab" * 10**6), ("rouge_5", " ".join(map(str, range(10**6))))],
)
def test_what_takes_too_much_is_ended(sandbox: SandboxPool, metric: Any, text: str) -> None:
    grader = sandbox_grader(
        TextSimilarity(reference="{{item.a}}", evaluation_metric=metric), sandbox
    )
    with pytest.raises(TakesTooMuch, match=r"more than (2 seconds|256 MiB)|more memory than"):
        grader.grade([answer(text, text[::-1])])
    assert grader.grade([answer("a", "a")]) == [1.0]


def test_work_is_cancelled_and_nobody_elses(sandbox: SandboxPool) -> None:
    patient = SandboxPool(600, LARGE_MEMORY, "the grader")
    grader = sandbox_grader(TextSimilarity(reference="{{item.a}}"), patient)
    uses: list[Cancellable] = []
    with cancelled_by(uses.append):
        assert grader.grade([answer("a", "a")]) == [1.0]
        uses[0].close()  # it has ended: the process is the next one's
        ((worker, _),) = patient._idle
        assert worker.alive
        threading.Timer(1, lambda: uses[1].close()).start()
        started = time.monotonic()
        with pytest.raises(WorkInterrupted):
            grader.grade([answer("ab" * 10**6, "ba" * 10**6)])
        assert time.monotonic() - started < 20
    patient.close()
    assert len(workers()) == len(sandbox._idle)
    with pytest.raises(WorkInterrupted, match="the service is ending"):
        grader.grade([answer("a", "a")])


def test_a_process_that_nobody_asks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = SandboxPool(5, MEMORY, "the work")
    grader = sandbox_grader(StringCheck(reference="{{item.a}}"), sandbox)
    assert grader.grade([answer("a", "a")]) == [1.0]
    ((first, _),) = sandbox._idle
    assert grader.grade([answer("a", "a")]) == [1.0]
    ((second, _),) = sandbox._idle
    assert second is first
    sandbox.close()

    monkeypatch.setattr(sandbox_pool, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(sandbox_pool, "GRACE_SECONDS", 0.5)
    sandbox = SandboxPool(5, MEMORY, "the work")
    grader = sandbox_grader(StringCheck(reference="{{item.a}}"), sandbox)
    assert grader.grade([answer("a", "a")]) == [1.0]
    ((first, _),) = sandbox._idle
    child = first._child
    assert child is not None and child.wait(60) == 0
    assert grader.grade([answer("a", "a")]) == [1.0]
    ((second, _),) = sandbox._idle
    assert second is not first
    sandbox.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh = SandboxPool(2, MEMORY, "the grader")
    grader = sandbox_grader(TextSimilarity(reference="{{item.a}}"), fresh)
    with monkeypatch.context() as patch:
        patch.setattr(child_python.sys, "executable", "/nowhere/python")
        with pytest.raises(WorkInterrupted, match="cannot start"):
            grader.grade([answer("a", "a")])
    assert grader.grade([answer("a", "a")]) == [1.0]
    fresh.close()


def test_only_what_compares_texts_goes_there(sandbox: SandboxPool) -> None:
    source = PythonSource(source="def grade(sample, item): return 1")
    both = Multi(graders={"a": GRADERS[0], "b": source}, calculate_output="a + b")
    made = sandbox_grader(both, sandbox)
    assert isinstance(made, Multi)
    assert isinstance(made.graders["a"], SandboxedGrader)
    assert made.graders["b"] is source
    assert grade_answers(made, [answer("Paris", "Paris")]).scores == [2.0]
