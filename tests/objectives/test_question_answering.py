"""Windows, loss and answers of extractive question answering."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from luthier.data.rows import load_rows
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import RawText
from luthier.errors import DataError, RowRefused
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.question_answering import AnswerSpan, QuestionAnswering, _answer
from luthier.tasks import READING

CPU = torch.device("cpu")
CONTEXT = "The quick brown fox jumps over the lazy dog. " * 6 + "The capital of France is Paris."
ASKED = AnsweredQuestion(
    "f", 1, "What is the capital?", CONTEXT, ("Paris",), (CONTEXT.index("Paris"),)
)
NOTHING = AnsweredQuestion("f", 2, "Who is king?", "The lazy dog is not.")


@pytest.fixture
def network(family_folder: Callable[[str], Path]) -> Network:
    folder = family_folder("bert")
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU, QuestionAnswering().head())
    network = as_network(model, CPU, torch.float32)
    chat = load_chat_format(folder)
    # The tiny tokenizer has no template for pairs.
    special = chat.tokenizer.cls_token, chat.tokenizer.sep_token
    chat.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="{} $A {}".format(*special),
        pair="{0} $A {1} $B:1 {1}:1".format(*special),
        special_tokens=[(each, chat.tokenizer.convert_tokens_to_ids(each)) for each in special],
    )
    chat.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    network.chat = chat
    return network


def test_windows_cover_context_and_shift_answer_span(network: Network) -> None:
    objective = QuestionAnswering(window=32, stride=6)
    example = objective.encode(ASKED, 0, network.chat)
    first, _, begin, end, *_ = example.target
    windows = objective.views([example])
    assert len(windows) > 2
    assert max(len(window) for window in windows) == 32
    covered = set()
    for window in windows:
        start, _, _, stop, offset = window.target
        covered |= {*range(begin + offset, stop + offset)}
        if start:
            assert start + offset == first
            assert window.ids_T[start] == example.ids_T[first]
        np.testing.assert_array_equal(window.ids_T[:begin], example.ids_T[:begin])
        assert window.ids_T[-1] == example.ids_T[-1]
    assert covered == {*range(begin, end)}
    assert any(window.target[0] for window in windows)
    many = objective.model_copy(update={"stride": 1000}).views([example])
    assert len(many) <= 2 * len(windows) + 1
    overlap = [
        before.target[3] + before.target[4] - begin - after.target[4]
        for before, after in pairwise(windows)
    ]
    assert overlap == [6] * len(overlap)


def test_loss_matches_transformers(network: Network, family_folder: Callable[[str], Path]) -> None:
    torch.manual_seed(0)  # the head of the fixture
    own: Any = load_model(family_folder("bert"), torch.float32, CPU, QuestionAnswering().head())
    own.eval()
    objective = QuestionAnswering(window=32, stride=6)
    rows = [objective.encode(row, n, network.chat) for n, row in enumerate((ASKED, NOTHING))]
    windows = objective.views(rows)
    expected = 0.0
    for window in windows:
        start, end = torch.from_numpy(window.target[:2])[:, None]
        with torch.no_grad():
            expected += float(
                own(
                    input_ids=torch.from_numpy(window.ids_T)[None],
                    token_type_ids=torch.from_numpy(window.segment_T)[None],
                    start_positions=start,
                    end_positions=end,
                ).loss
            )
    with torch.no_grad():
        ours = sum(
            float(objective.loss(network, batch).total)
            for batch in network.batches(windows, 10_000)
        )
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "no_answer", "answer"),
    [
        (ASKED, True, "Paris"),
        (NOTHING, True, ""),
        (ASKED, False, "Paris"),
        (NOTHING, False, "The"),
        # Readers that were published or stored without the setting.
        (NOTHING, None, ""),
    ],
)
def test_the_best_span_of_all_windows_is_the_answer(
    row: AnsweredQuestion,
    no_answer: bool | None,
    answer: str,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that scores the tokens of "Paris" highest."""
    objective = QuestionAnswering(window=32, stride=6, no_answer=no_answer)
    example = objective.encode(ASKED, 0, network.chat)
    wanted = {int(each) for each in example.ids_T[example.target[0] : example.target[1] + 1]}

    def scored(self: Any, network: Network, batch: Any) -> torch.Tensor:
        parts = []
        for each in batch.tree.examples:
            score_T2 = torch.zeros(len(each), 2)
            score_T2[0] = 1.0
            for place in range(int(each.target[2]), int(each.target[3])):
                first, last = (
                    each.ids_T[place - 1] not in wanted,
                    each.ids_T[place + 1] not in wanted,
                )
                if each.ids_T[place] in wanted and (first or last):
                    score_T2[place] = torch.tensor([3.0 * first, 3.0 * last])
            parts.append(score_T2)
        return torch.nn.utils.rnn.pad_sequence(parts, True, -torch.inf)

    monkeypatch.setattr(QuestionAnswering, "_scores", scored)
    examples = [objective.encode(row.bare(), 0, network.chat)]
    (batch,) = network.batches(examples, 10_000)
    (found,) = objective.predict(network, batch)
    assert answer in found["answer"] and bool(answer) is bool(found["answer"])
    assert row.context[found["start"] : found["end"]] == found["answer"]
    assert 0 < found["score"] <= 1


def test_question_longer_than_window_is_refused(network: Network) -> None:
    row = AnsweredQuestion("f", 1, "what " * 40, "Paris")
    with pytest.raises(RowRefused) as refused:
        QuestionAnswering(window=32).encode(row, 0, network.chat)
    assert refused.value.rule == "row.too_long"
    with pytest.raises(RowRefused) as refused:
        QuestionAnswering().encode(RawText("f", 1, "Paris"), 0, network.chat)
    assert refused.value.rule == "row.objective"


@pytest.mark.parametrize(("unit", "start"), [("UTF-16", 9), ("bytes", 13)])
def test_answer_positions_in_bytes_are_refused(unit: str, start: int, tmp_path: Path) -> None:
    answers = {"text": ["ha"], "answer_start": [start]}
    row = {"question": "What?", "context": "ha 🚲🚲, ha ha", "answers": answers}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    (problem,) = caught.value.problems
    assert problem.rule == "answers.span" and unit in problem.message
    assert '"answer_start": 7' in problem.advice


@pytest.mark.parametrize(
    ("answers", "rule"),
    [
        ('{"text": ["Paris"], "answer_start": [0]}', ""),
        ('[{"text": "Paris", "answer_start": 0}]', ""),
        ('{"text": [], "answer_start": []}', ""),
        ('{"text": ["Paris"]}', "answers.type"),
        ('["Paris"]', "answers.type"),
        ('{"text": ["Paris"], "answer_start": [3]}', "answers.span"),
        ('{"text": ["London"], "answer_start": [0]}', "answers.span"),
    ],
)
def test_both_forms_of_squad_are_read(answers: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "Where?", "context": "Paris is big.", "answers": {answers}}}\n')
    if rule:
        with pytest.raises(DataError) as refused:
            list(load_rows(path))
        assert [problem.rule for problem in refused.value.problems] == [rule]
        assert refused.value.problems[0].location.line == 1
        return
    (row,) = load_rows(path)
    assert isinstance(row, AnsweredQuestion)
    assert [row.context[s : s + 5] for s in row.starts] == [*row.answers]


def test_an_edited_context_keeps_the_answer_in_place() -> None:
    row = AnsweredQuestion("f", 1, "Who?", "Ann and Bob met Bob.", ("Bob", "Bob"), (8, 16))
    assert row.edit_texts(lambda field, text: text) == row
    edited = row.edit_texts(lambda field, text: text.replace("Ann", "Somebody"))
    assert edited.context == "Somebody and Bob met Bob."
    assert (edited.answers, edited.starts) == (("Bob", "Bob"), (13, 21))


def test_scores_match_squad() -> None:
    rows = [
        AnsweredQuestion("f", 1, "q", "The Eiffel Tower, Paris", ("Eiffel Tower",), (4,)),
        AnsweredQuestion("f", 2, "q", "red brown fox", ("brown fox",), (4,)),
        AnsweredQuestion("f", 3, "q", "no answer here"),
        AnsweredQuestion("f", 4, "q", "no answer here"),
    ]
    answers = [{"answer": text} for text in ("the Eiffel Tower!", "fox", "", "here")]
    found = READING.scores(rows, answers)
    assert found["exact_match"].value == pytest.approx(2 / 4)
    assert found["answer_f1"].value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)


@pytest.mark.parametrize(("words", "limit"), [(3, 30), (60, 75), (2000, 1000)])
@pytest.mark.parametrize("rows", [(), (NOTHING,)])
def test_limits_of_the_training_rows(
    words: int, limit: int, rows: tuple[AnsweredQuestion, ...], network: Network
) -> None:
    context = "fox " * words + "jumps"
    row = AnsweredQuestion("f", 1, "who?", context, (context[: 4 * words - 1],), (0,))
    fitted = QuestionAnswering().fit([row, *rows], network.chat)
    assert fitted.max_answer_tokens == limit
    assert fitted.no_answer is bool(rows)
    given = QuestionAnswering(max_answer_tokens=7, no_answer=True).fit([row], network.chat)
    assert (given.max_answer_tokens, given.no_answer) == (7, True)


def test_answer_longer_than_each_window_is_refused(network: Network) -> None:
    row = AnsweredQuestion("f", 1, "who?", "fox " * 60, (("fox " * 40).strip(),), (8,))
    with pytest.raises(RowRefused) as refused:
        QuestionAnswering(window=32).encode(row, 0, network.chat)
    assert refused.value.rule == "row.too_long"
    QuestionAnswering(window=64).encode(row, 0, network.chat)


def test_windows_without_the_answer_are_not_scored(network: Network) -> None:
    def counted(no_answer: bool | None) -> list[float]:
        objective = QuestionAnswering(window=32, stride=6, no_answer=no_answer)
        windows = objective.views([objective.encode(ASKED, 0, network.chat)])
        (batch,) = network.batches(windows, 10_000)
        with torch.no_grad():
            found = objective.loss(network, batch).ratios
        assert len(found["exact_match"][1]) == len(windows) > 2
        return [
            float(np.sum(found["exact_match"][1])),
            float(np.count_nonzero(found["span_f1"][1])),
        ]

    holding = counted(False)[0]
    assert 0 < holding < counted(True)[0]
    assert counted(False)[1] == holding
    assert counted(None) == counted(True)


def test_answers_do_not_begin_with_a_blank() -> None:
    """Offsets of byte-level tokenizers include the blank before a word."""
    row = AnsweredQuestion("f", 1, "where?", "in  Ghent \n.", (), ())
    offsets = [(0, 2), (2, 9), (9, 11), (11, 12)]
    encoder = SimpleNamespace(encode_pair=lambda *texts: SimpleNamespace(offsets=offsets))
    chat: Any = SimpleNamespace(text_tokenizer=encoder)
    example: Any = SimpleNamespace(source_row=row)
    for first, last in ((1, 1), (1, 2)):
        found = _answer(example, AnswerSpan(1.0, first, last), 0.5, chat)
        assert found == {"answer": "Ghent", "start": 4, "end": 9, "score": 0.5}
