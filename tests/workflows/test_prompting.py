"""What prompting gives: what is put before a question, and that loss and answers are the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from luthier.data.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.errors import RecipeError
from luthier.models import decoding
from luthier.models.decoding import Completion
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.types import Message
from luthier.workflows import prompting
from luthier.workflows.prompting import (
    NearestExamples,
    Prompting,
    Question,
    conversation_of,
    cut_passages,
    few_shot,
    questions_of,
    retrieve_passages,
    ways_to_ask,
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
HELD = questions_of(
    [LabelledText("f", 5, text="the quick fox", label="animal")], ("animal", "bank")
)


@pytest.fixture
def asked(tiny_model_folder: Path) -> Prompting:
    model = load_model(tiny_model_folder, torch.float32, torch.device("cpu"))
    network = as_network(model, torch.device("cpu"), torch.float32)
    return Prompting(network, load_chat_format(tiny_model_folder), 512)


def test_rows_become_questions() -> None:
    system, user = TRAIN[0].asked
    assert "animal, bank" in system.content and system.role == "system"
    assert TRAIN[0].text == user.content == "the quick brown fox" and TRAIN[0].answer == "animal"
    chat = (Message("system", "Be brief."), Message("user", "1?"), Message("assistant", "2"))
    assert questions_of([Conversation("f", 1, messages=chat)])[0] == Question(chat[:2], "2")
    with pytest.raises(RecipeError):
        questions_of([RawText("f", 1, text="raw")])


@pytest.mark.parametrize("body", ["", "{{ raise_exception('no system') }}"])
def test_names_stand_before_the_first_turn_where_a_template_has_no_system(
    body: str, new_tokenizer: Callable[..., Any]
) -> None:
    without = (
        "{% for m in messages %}{% if m.role == 'system' %}" + body + "{% else %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    chat = ChatFormat.of(new_tokenizer(without))
    assert not chat.takes_system and ChatFormat.of(new_tokenizer()).takes_system
    turns = conversation_of(HELD[0], TRAIN[:1], chat)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert "animal, bank" in turns[0].content and turns[0].content.endswith("the quick brown fox")
    assert "animal, bank" not in turns[2].content
    assert chat.prompt_text(turns).count("animal, bank") == 1
    with_system = conversation_of(HELD[0], TRAIN[:1], ChatFormat.of(new_tokenizer()))
    assert [turn.role for turn in with_system] == ["system", "user", "assistant", "user"]


def test_examples_show_every_answer_and_are_drawn_by_seed() -> None:
    for seed in range(5):
        assert {each.answer for each in few_shot(TRAIN, 2, seed)} == {"animal", "bank"}
        assert few_shot(TRAIN, 3, seed) == few_shot(TRAIN, 3, seed)
    assert len(few_shot(TRAIN, 9, 0)) == 4
    assert len({tuple(few_shot(TRAIN, 4, seed)) for seed in range(20)}) > 3


def test_the_nearest_example_stands_last() -> None:
    ((*_, last),) = NearestExamples(TRAIN).of(HELD, 3)
    assert "fox" in last.text
    ((text,),) = retrieve_passages(
        HELD, ["Cards come by post.", "A fox can jump.\nThe quick fox is high."], 1
    )
    assert "fox" in text


def test_what_is_meant_finds_what_is_said_in_other_words() -> None:
    documents = ["Cards come by post.\n" * 80, "The vixen leaps over the fence.\n" * 30]

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        animal = [any(word in text for word in ("vixen", "fox", "jump")) for text in texts]
        return np.array([[each, not each] for each in animal], np.float32)

    asked = [Question((Message("user", "How high does a fox jump?"),), "2 m")]
    ((*_, found),) = retrieve_passages(asked, documents, 1, embed)
    assert "vixen" in found
    names = [way.name for way in ways_to_ask(asked, TRAIN, documents, embed)]
    assert names[2:] == [
        "4 nearest examples by words", "4 nearest examples by words and meaning",
        "passages of the documents by words", "passages of the documents by words and meaning",
    ]  # fmt: skip


def test_documents_are_cut_at_lines_and_lose_no_word() -> None:
    document = "\n".join(f"line {n} " + "word " * (n % 40) for n in range(60)) + " long" * 500
    parts = cut_passages([document])
    assert " ".join(parts).split() == document.split()
    assert max(len(part.split()) for part in parts) <= prompting.WORDS
    assert cut_passages([""]) == []


def test_the_loss_is_that_of_the_answer_behind_what_is_given(
    asked: Prompting, tiny_model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    given = few_shot(TRAIN, 2, 0)
    found = asked.measure("few-shot", HELD, [given])
    assert found is not None
    names, question = HELD[0].asked  # the names of the classes stand there once
    turns = [turn for each in given for turn in (each.asked[1], Message("assistant", each.answer))]
    whole = asked.chat.encode_reply((names, *turns, question, Message("assistant", "animal")), 6)
    ids_T = torch.from_numpy(whole.ids_T)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    logits_TV = plain(input_ids=ids_T[None]).logits[0]
    nll_T = F.cross_entropy(logits_TV.detach()[:-1], ids_T[1:], reduction="none")
    learned_T = torch.from_numpy(whole.learned_T[1:])
    assert found.loss == pytest.approx(float(nll_T[learned_T].mean()), rel=1e-5)
    assert found.prompt_tokens == len(ids_T) - int(learned_T.sum())
    assert found.exact is not None and found.exact.value in (0.0, 1.0) and found.seconds > 0
    zero = asked.measure("zero-shot", HELD, [[]])
    assert zero is not None and zero.prompt_tokens < found.prompt_tokens


def test_answers_that_are_right_are_counted(
    asked: Prompting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(
        network: Any, prompts: Any, count: int, sampling: Any, **settings: Any
    ) -> list[list[Completion]]:
        assert sampling.temperature == 0 and settings["stop_ids"]
        # The stop token is no part of an answer, and may be one that is not special.
        ids = [asked.chat.tokenizer.encode(text) for text in (" animal\n.", "dog.")]
        return [[Completion(np.array(each), np.zeros(0, np.float32), True)] for each in ids]

    monkeypatch.setattr(decoding, "sample", sample)
    found = asked.measure("zero-shot", [*HELD, *HELD], [[], []])
    assert found.exact is not None and found.exact.value == 0.5


def test_only_what_fits_with_what_is_given_can_be_asked(asked: Prompting) -> None:
    questions, given = [*HELD, *HELD], [[], few_shot(TRAIN, 1, 0) * 20]
    assert asked.fitting(questions, given) == [0]
    asked.context = 4
    assert asked.fitting(questions, given) == []


def test_a_model_without_turns_reads_one_text(
    asked: Prompting, family_folder: Callable[[str], Path]
) -> None:
    asked.chat = ChatFormat.of(asked.chat.tokenizer, "plain", asked.chat.stop_ids)
    found = asked.measure("few-shot", HELD, [[*few_shot(TRAIN, 1, 0), "A passage."]])
    assert found.prompt_tokens > 10
