"""What is asked twice, and what an outage leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from luthier.chat_models.base import (
    CachedWriter,
    ChatModel,
    Done,
    Failure,
    ModelSpec,
    Reply,
    SamplingSpec,
    writer_of,
)
from luthier.errors import LuthierError, RecipeError
from luthier.types import Message


def questions(*texts: str) -> list[Sequence[Message]]:
    return [(Message("user", text),) for text in texts]


def test_equal_conversations_have_one_answer_and_failures_are_asked_again() -> None:
    asked: list[str] = []
    down = {"b"}

    def write(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
        texts = [turns[-1].content for turns in conversations]
        asked.extend(texts)
        return [Failure("judge.failed", "down") if t in down else t.upper() for t in texts]

    writer = CachedWriter(write)
    lost = Failure("judge.failed", "down")
    assert writer(questions("a", "b", "a", "c", "b")) == ["A", lost, "A", "C", lost]
    assert asked == ["a", "b", "c"]
    down.clear()
    assert writer(questions("c", "b", "a")) == ["C", "B", "A"]
    assert asked == ["a", "b", "c", "b"]
    other = [(Message("system", "a"), Message("user", "a"))]
    assert writer(other) == ["A"] and asked[-1] == "a"  # another conversation that ends alike
    assert writer([]) == []
    with pytest.raises(ValueError):
        CachedWriter(lambda asked: [])(questions("a"))


class Stops(ChatModel):
    """Answers one question, then raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        done(1, Reply("yes", "stop"))
        done(2, Failure("judge.refused", "HTTP 400"))
        raise self.error


def test_an_outage_keeps_what_was_answered_and_names_what_was_not() -> None:
    write = writer_of(Stops(LuthierError("it is down")), "judge", SamplingSpec(), lambda text: None)
    lost = Failure("judge.failed", "it is down")
    assert write(questions(*"abcd")) == [lost, "yes", Failure("judge.refused", "HTTP 400"), lost]


def test_what_no_row_could_mend_ends_it() -> None:
    write = writer_of(
        Stops(RecipeError("no such model")), "judge", SamplingSpec(), lambda text: None
    )
    with pytest.raises(RecipeError):
        write(questions(*"abcd"))


@pytest.mark.parametrize("key", ["sk-proj-abc", "1KEY", "MY KEY", ""])
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError) as caught:
        ModelSpec(model="m", url="https://h/v1", key_env=key)
    message = caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]
    assert not key or key not in message
