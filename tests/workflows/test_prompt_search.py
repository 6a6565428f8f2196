"""A searched prompt: what it is allowed to see, that it finds what helps, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.errors import RecipeError
from luthier.serving.prompting import Question, Way
from luthier.types import Message
from luthier.workflows import prompt_search
from luthier.workflows.prompt_search import MEASURED_ROWS, MINIBATCH, search_prompt

KINDS = "animal", "tool", "river", "town"


def ask(text: str, answer: str) -> Question:
    return Question((Message("user", text),), answer)


TRAIN = [ask(f"{KINDS[n % 4]} number {n}?", KINDS[n % 4]) for n in range(80)]


class Model:
    """Right where an example of the same answer is shown, or the instruction has the word."""

    def __init__(self, word: str = "", seconds: float = 0.0) -> None:
        self.word, self.seconds, self.asked = word, seconds, 0
        self.measured: set[int] = set()
        self.shown: set[str] = set()

    def __call__(self, numbers: Sequence[int], way: Way) -> list[tuple[str, float]]:
        time.sleep(self.seconds)
        self.asked += len(numbers)
        found = []
        for number, given in zip(numbers, way.context, strict=True):
            question = TRAIN[number]
            texts = [each.text for each in given if isinstance(each, Question)]
            assert question.text not in texts, "a question is shown with its own answer"
            self.shown.update(texts)
            instructed = bool(self.word) and self.word in way.instruction
            right = instructed or any(text.split()[0] == question.answer for text in texts)
            found.append((question.answer if right else "no", float(right)))
        if len(numbers) > MINIBATCH or not self.measured:
            self.measured.update(numbers)
        return found


def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the nearest examples, and without examples of all answers to begin with."""
    starts = prompt_search._Search.starts
    monkeypatch.setattr(prompt_search._Search, "starts", lambda self: starts(self)[:1])


def test_examples_that_help_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch)
    model = Model()
    found = search_prompt(model, lambda text, seed: "", TRAIN, 30, most_answers=4000)
    assert found.first_score == 0 < 0.9 < found.score
    assert found.instruction == "" and found.candidates > 2
    assert found.answers == model.asked <= 4000 + 2 * MEASURED_ROWS[1]
    # What is measured on is never shown as an example.
    assert not model.shown & {TRAIN[number].text for number in model.measured}
    way = found.way([ask("river number 900?", "river")], TRAIN)
    assert way.technique == "prompt engineering" and way.shows_training_rows
    assert any(each.answer == "river" for each in way.context[0] if isinstance(each, Question))


def test_an_instruction_that_helps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch)
    monkeypatch.setattr(prompt_search._Search, "_exchange", lambda self, found, records: "")
    texts: list[str] = []

    def reflect(text: str, seed: int) -> str:
        texts.append(text)
        return "```text\nBe careful.\n```" if seed < 4 else "Name the kind."

    found = search_prompt(Model("kind"), reflect, TRAIN, 30, most_answers=4000)
    assert (found.score, found.instruction) == (1.0, "Name the kind.")
    assert "Answer given: no" in texts[0] and "Right answer:" in texts[0]
    assert "'Name the kind.'" in found.describe() and "0.0%" in found.describe()
    assert found.way(TRAIN[:1], TRAIN).instruction == "Name the kind."


def test_examples_are_found_by_meaning_where_there_is_an_encoder() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        seen.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    found = search_prompt(Model(), lambda text, seed: "x", TRAIN, 30, most_answers=600, embed=embed)
    assert seen, "the search looks for examples with it"
    seen.clear()
    replace(found, nearest=2).way(TRAIN[:1], TRAIN, embed)
    assert TRAIN[0].text in seen
    long = replace(found, instruction="word " * 200).describe()
    assert len(long) < 500 and long.endswith("' …")


def test_the_best_of_what_needs_no_search_is_the_start() -> None:
    found = search_prompt(Model(), lambda text, seed: "x", TRAIN, 30, most_answers=600)
    assert found.first_score == found.score == 1.0  # four examples, one of each answer
    assert found.answers < 200, "a search goes on though all is right"


def test_a_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch)
    began = time.monotonic()
    model = Model("never", 0.05)
    # Without examples and without the word nothing is ever right, so only time can end it.
    monkeypatch.setattr(prompt_search._Search, "_exchange", lambda self, found, records: "")
    found = search_prompt(model, lambda text, seed: "again", TRAIN, 1.0)
    assert 1.0 <= time.monotonic() - began < 3 and found.score == 0


def test_without_a_score_nothing_is_searched_unless_it_is_asked_for() -> None:
    asked = 0

    def wrong(numbers: Sequence[int], way: Way) -> list[tuple[str, float]]:
        nonlocal asked
        asked += len(numbers)
        return [("no", 0.0)] * len(numbers)

    with pytest.raises(
        RecipeError, match=r"none of .* scores above 0, so nothing tells one prompt"
    ):
        search_prompt(wrong, lambda text, seed: "x", TRAIN, 30, needs_score=True)
    first = asked
    search_prompt(wrong, lambda text, seed: "x", TRAIN, 1, most_answers=2 * first)
    assert asked > 2 * first


def test_few_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="24 different training rows and more, and these are 1"):
        search_prompt(Model(), lambda text, seed: "", TRAIN[:1] * 40, 1.0)
