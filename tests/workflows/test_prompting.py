"""Prompts of techniques: text before a question, and unchanged loss and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.citations import add_passages
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.errors import RecipeError
from luthier.evaluation.evaluate import grade
from luthier.graders import Exact
from luthier.types import Message
from luthier.workflows.prompting import (
    Question,
    conversation_of,
    few_shot,
    nearest_examples,
    prompt_variants,
    questions_of,
    retrieve_passages,
)

TRAIN = questions_of(
    [
        LabelledText("f", 1, text="the quick brown fox", label="animal"),
        LabelledText("f", 2, text="my card has not arrived", label="bank"),
        LabelledText("f", 3, text="the lazy dog jumps", label="animal"),
        LabelledText("f", 4, text="when will my new card be delivered", label="bank"),
    ],
    ("animal", "bank"),
)
HELD_OUT_ROWS = questions_of(
    [LabelledText("f", 5, text="the quick fox", label="animal")], ("animal", "bank")
)


def test_rows_become_questions() -> None:
    system, user = TRAIN[0].asked
    assert "animal, bank" in system.content and system.role == "system"
    assert TRAIN[0].text == user.content == "the quick brown fox" and TRAIN[0].answer == "animal"
    chat = (Message("system", "Be brief."), Message("user", "1?"), Message("assistant", "2"))
    assert questions_of([Conversation("f", 1, messages=chat)])[0] == Question(chat[:2], "2")
    with pytest.raises(RecipeError):
        questions_of([RawText("f", 1, text="raw")])


@pytest.mark.parametrize("body", ["", "{{ raise_exception('no system') }}"])
def test_label_names_precede_first_turn_without_system_prompt(
    body: str, new_tokenizer: Callable[..., Any]
) -> None:
    without = (
        "{% for m in messages %}{% if m.role == 'system' %}" + body + "{% else %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    chat = ChatFormat.of(new_tokenizer(without))
    assert not chat.supports_system_prompt and ChatFormat.of(new_tokenizer()).supports_system_prompt
    turns = conversation_of(HELD_OUT_ROWS[0], TRAIN[:1], chat)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert "animal, bank" in turns[0].content and turns[0].content.endswith("the quick brown fox")
    assert "animal, bank" not in turns[2].content
    assert chat.prompt_text(turns).count("animal, bank") == 1
    with_system = conversation_of(HELD_OUT_ROWS[0], TRAIN[:1], ChatFormat.of(new_tokenizer()))
    assert [turn.role for turn in with_system] == ["system", "user", "assistant", "user"]


def test_examples_show_every_answer_and_are_drawn_by_seed() -> None:
    for seed in range(5):
        assert {each.answer for each in few_shot(TRAIN, 2, seed)} == {"animal", "bank"}
        assert few_shot(TRAIN, 3, seed) == few_shot(TRAIN, 3, seed)
    assert len(few_shot(TRAIN, 9, 0)) == 4
    assert len({tuple(few_shot(TRAIN, 4, seed)) for seed in range(20)}) > 3


def test_nearest_example_is_last() -> None:
    ((*_, last),) = nearest_examples(HELD_OUT_ROWS, TRAIN, 3)
    assert "fox" in last.text
    ((text,),) = retrieve_passages(
        HELD_OUT_ROWS, ["Cards come by post.", "A fox can jump.\nThe quick fox is high."], 1
    )
    assert "fox" in text


def test_retrieval_by_meaning_finds_synonyms() -> None:
    documents = ["Cards come by post.\n" * 80, "The vixen leaps over the fence.\n" * 30]

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        animal = [any(word in text for word in ("vixen", "fox", "jump")) for text in texts]
        return np.array([[each, not each] for each in animal], np.float32)

    asked = [Question((Message("user", "How high does a fox jump?"),), "2 m")]
    ((*_, found),) = retrieve_passages(asked, documents, 1, embed)
    assert "vixen" in found
    names = [variant.name for variant in prompt_variants(asked, TRAIN, documents, embed)]
    assert names[2:] == [
        "4 nearest examples by words", "4 nearest examples by words and meaning",
        "passages of the documents by words", "passages of the documents by words and meaning",
    ]  # fmt: skip


def test_plain_template_prompt_is_a_single_turn(new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer()).with_template("plain")
    (turn,) = conversation_of(HELD_OUT_ROWS[0], [*few_shot(TRAIN, 1, 0), "A passage."], chat)
    assert turn.content.index("A passage.") < turn.content.index("the quick fox")


def test_passages_have_the_prompt_of_ask(new_tokenizer: Callable[..., Any]) -> None:
    asked = Question((Message("user", "How high does a fox jump?"),), "2 m")
    turns = conversation_of(asked, ["Foxes jump 2 m."], ChatFormat.of(new_tokenizer()))
    assert [*turns] == add_passages(asked.asked, ["Foxes jump 2 m."])
    row = Conversation("f", 1, (*turns, Message("assistant", "2 m")))
    assert grade([row], ["2 m [1]"], {"exact": Exact()}).scores == {"exact": 1.0}
