"""Span corruption against the paper's figure 2 and section 3.1.4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import SpanCorruption
from luthier.objectives.base import RunModels
from luthier.types import Example

SENTINELS = tuple(range(900, 940))
START, END = 0, 1


def objective(**fields: Any) -> SpanCorruption:
    given = {"sentinels": SENTINELS, "start_id": START, "end_id": END, **fields}
    return SpanCorruption.model_validate(given)


def restored(example: Example) -> list[int]:
    """Return the text with the spans of source and target put back."""
    assert example.source_T is not None
    spans: dict[int, list[int]] = {}
    for token in example.ids_T.tolist()[1:-1]:
        if token in SENTINELS:
            spans[token] = span = []
        else:
            span.append(token)
    assert spans.pop(token) == []  # the last sentinel closes the last span
    out: list[int] = []
    for token in example.source_T.tolist()[:-1]:
        out += spans.pop(token) if token in spans else [token]
    assert not spans
    return out


def pieces(size: int, count: int = 1, **fields: Any) -> tuple[SpanCorruption, list[Example]]:
    chosen = objective(sequence_length=size, **fields)
    ids_T = np.arange(100, 100 + size * count)
    return chosen, chosen.pack([Example(ids_T, np.ones(len(ids_T), np.float32), 0)], 4096)


@pytest.mark.parametrize("size", [4, 5, 20, 128, 200])
def test_source_and_target_hold_the_whole_text(size: int) -> None:
    chosen, (example,) = pieces(size)
    torch.manual_seed(size)
    (seen,) = chosen.views([example], "random")
    assert restored(seen) == example.ids_T.tolist()
    assert seen.ids_T[0] == START and seen.ids_T[-1] == seen.source_T[-1] == END  # type: ignore[index]
    assert seen.weight_T.tolist() == [0.0] + [1.0] * (len(seen) - 1)
    assert seen.weight == example.weight  # the engine counts this weight before spans are drawn


def test_spans_match_requested_density_and_length() -> None:
    chosen, (example,) = pieces(200, noise_density=0.15, mean_span_length=3.0)
    (seen,) = chosen.views([example], "random")
    taken = [token for token in seen.ids_T[1:-1].tolist() if token not in SENTINELS]
    marks = [token for token in seen.source_T.tolist() if token in SENTINELS]  # type: ignore[union-attr]
    assert len(taken) == 30 and marks == list(SENTINELS[:10])


def test_spans_vary_in_training_and_repeat_in_validation() -> None:
    chosen, examples = pieces(64, count=3)
    torch.manual_seed(1)
    first, second = (chosen.views(examples, "random") for _ in range(2))
    assert any(
        a.source_T.tolist() != b.source_T.tolist() for a, b in zip(first, second, strict=True)
    )  # type: ignore[union-attr]
    torch.manual_seed(1)
    again = chosen.views(examples, "random")
    assert [e.ids_T.tolist() for e in again] == [e.ids_T.tolist() for e in first]
    state = torch.get_rng_state()
    fixed = [[e.ids_T.tolist() for e in chosen.views(examples, "fixed")] for _ in range(2)]
    assert fixed[0] == fixed[1] and torch.equal(torch.get_rng_state(), state)


def test_inner_tokens_are_masked_equally_often() -> None:
    chosen, (example,) = pieces(60)
    torch.manual_seed(0)
    counts = np.zeros(60)
    for _ in range(1500):
        (seen,) = chosen.views([example], "random")
        taken = [t - 100 for t in seen.ids_T.tolist() if t not in (*SENTINELS, START, END)]
        counts[taken] += 1
    # The authors' partitions begin with text and end with a span: 2 of the 3 spans lie inside.
    inner = counts[10:50] / 1500
    assert inner.mean() == pytest.approx(6 / 54, abs=0.01) and np.ptp(inner) < 0.06


def test_pieces_with_more_spans_than_sentinels_are_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        pieces(400, sentinels=SENTINELS[:5])
    assert refused.value.rule == "objective.sentinels"


def test_sentinels_come_from_tokenizer(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("t5"))
    fitted = SpanCorruption().fit([RawText("f", 1, text="a")], chat)
    names = chat.tokenizer.convert_ids_to_tokens(list(fitted.sentinels or ()))
    assert names == [f"<extra_id_{n}>" for n in range(20)]
    assert fitted.start_id == chat.tokenizer.pad_token_id
    with pytest.raises(RecipeError) as refused:
        SpanCorruption().bind(RunModels(load_chat_format(family_folder("gpt2"))))
    assert refused.value.rule == "objective.network"
