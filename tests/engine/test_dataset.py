"""Records of the training rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import disk_sequence as spool
from luthier.data.conversations.chat import ChatFormat
from luthier.engine.dataset import Dataset, loss_mask, prepare
from luthier.engine.job import prepare_job
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.errors import DataError
from luthier.library.models import find
from luthier.objectives import OBJECTIVES
from luthier.recipe import DataSpec, Recipe

TURNS = (
    (("user", "Colour of snow?"), ("assistant", "White.")),
    (
        ("user", "Of the sky?"),
        ("assistant", "Blue."),
        ("user", "At night?"),
        ("assistant", "Black."),
    ),
    (("system", "Be brief."), ("user", "Of coal?"), ("assistant", "Black, too.")),
)


def test_mask_covers_exactly_the_replies(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in TURNS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = find(str(tiny_model_folder)).chat
    spec = DataSpec(train=data, validation_share=0)
    made = prepare(spec, OBJECTIVES["sft"](), chat, 256, 0)
    mask = made.mask
    assert mask is not None
    replies = [text for turns in TURNS for role, text in turns if role == "assistant"]
    assert (mask.stretches, mask.behind_opening, mask.with_stop) == (4, 4, 4)
    learned = [
        chat.tokenizer.decode(each.ids_T[each.weight_T > 0], skip_special_tokens=False)
        for each in made.train
    ]
    stop = chat.tokenizer.decode([chat.stop_ids[0]])
    assert "".join(learned).count(stop) == 4 and "Colour" not in "".join(learned)
    assert all(reply in "".join(learned) for reply in replies)
    digest = hashlib.sha256(b"".join(e.ids_T.tobytes() + e.weight_T.tobytes() for e in made.train))
    assert mask.sha256 == digest.hexdigest()


def test_rows_of_several_sequences_are_counted_in_full(
    tmp_path: Path, new_tokenizer: Callable[..., Any]
) -> None:
    """The template writes no end token, so each reply is a sequence of its own."""
    template = (
        "{% for m in messages %}{{ '\n' if not loop.first }}{{ m.role }}: {{ m.content }}"
        "{% endfor %}{{ '\nassistant:' if add_generation_prompt }}"
    )
    data = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in TURNS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat, objective = ChatFormat.of(new_tokenizer(template)), OBJECTIVES["sft"]()
    spec = DataSpec(train=data, validation_share=0)
    made = prepare(spec, objective, chat, 256, 0)
    views = objective.views(made.train)
    assert (len(made.train), len(views)) == (3, 4)
    assert made.counts["rows"] == made.counts["examples"] == 3
    assert made.counts["tokens"] == sum(map(len, views))
    assert made.counts["learned_tokens"] == sum(view.weight for view in views)
    assert made.longest == max(map(len, views))
    assert made.mask is not None
    assert made.mask.stretches == made.mask.behind_opening == made.mask.with_stop == 4
    shorter = made.longest - 1
    dropped = prepare(spec.model_copy(update={"long_rows": "drop"}), objective, chat, shorter, 0)
    assert dropped.dropped == sum(max(map(len, each.sides)) > shorter for each in made.train)
    cut = prepare(spec.model_copy(update={"long_rows": "truncate"}), objective, chat, shorter, 0)
    assert cut.truncated == dropped.dropped > 0 and cut.longest == shorter


@pytest.mark.parametrize(("key", "targets"), [("label", ("a", "b")), ("rating", (1.5, 2.5))])
def test_long_texts_of_classifiers_are_truncated_by_default(
    tmp_path: Path, family_folder: Callable[[str], Path], key: str, targets: tuple[object, object]
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": "fox", key: targets[0]}, {"text": "fox " * 300, key: targets[1]}] * 2
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = find(str(family_folder("bert"))).chat
    spec = DataSpec(train=data, validation_share=0)
    made = prepare(spec, None, chat, 64, 0)
    assert (made.truncated, made.longest) == (2, 64)
    assert ("data.long_rows", "truncate") in {choice[:2] for choice in made.choices}
    with pytest.raises(DataError) as refused:
        prepare(spec.model_copy(update={"long_rows": "error"}), None, chat, 64, 0)
    assert refused.value.rule == "row.too_long"


def test_mask_off_by_a_token_is_visible(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": f"a{n}"}) + "\n" for n in range(5))
    )
    chat = find(str(tiny_model_folder)).chat
    train = prepare(
        DataSpec(train=data, validation_share=0), OBJECTIVES["sft"](), chat, 256, 0
    ).train
    assert len(chat.reply_opening()) > 0
    early = [replace(each, weight_T=np.roll(each.weight_T, -1)) for each in train]
    found, shifted = loss_mask(train, chat), loss_mask(early, chat)
    assert found is not None and shifted is not None and found.sha256 != shifted.sha256
    assert (found.behind_opening, found.with_stop) == (5, 5)
    assert (shifted.behind_opening, shifted.with_stop) == (0, 0)
    nothing = [replace(each, weight_T=np.zeros_like(each.weight_T)) for each in train]
    assert loss_mask(nothing, chat) is None


@pytest.mark.parametrize(
    ("method", "default"),
    [("classification", "truncate"), ("regression", "truncate"), ("reranker", "truncate"),
     ("sft", "error"), ("contrastive", "error")],
)  # fmt: skip
def test_default_for_long_rows(method: str, default: str) -> None:
    objective = OBJECTIVES[method].model_validate({})
    assert objective.long_rows() == default
    assert {objective.long_rows(each) for each in ("drop", "truncate", "error")} == {
        "drop", "truncate", "error",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "causal_lm", "dpo", "kto"])
def test_rows_on_disk_equal_rows_in_memory(
    method: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, count: int) -> Path:
        rows = [{"text": f"{name} {n} " + "word " * (n % 9)} for n in range(count)]
        if method == "sft":
            rows = [{"prompt": f"{name} {n}?", "completion": f"{n % 3}"} for n in range(count)]
        if method in ("dpo", "kto"):
            rows = [
                {"prompt": f"{name} {n}?", "chosen": f"a{n}", "rejected": "b"} for n in range(count)
            ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    chat = find(str(tiny_model_folder)).chat
    fields = {"sequence_length": 32} if method == "causal_lm" else {}
    spec = DataSpec(
        train=write("main", 60),
        mix=[{"train": write("more", 17), "weight": 0.5}],  # type: ignore[list-item]
        validation_share=0.1,
        test_share=0.1,
        train_share=0.8,
    )

    def made() -> Dataset:
        return prepare(spec, OBJECTIVES[method](**fields), chat, 256, 3)

    in_memory = made()
    monkeypatch.setattr(spool, "MEMORY_LIMIT", 0)
    on_disk = made()
    assert isinstance(in_memory.train, list) and not isinstance(on_disk.train, list)
    for name in ("counts", "mask", "mixed", "held_out", "longest", "hashes", "choices", "dropped"):
        assert getattr(on_disk, name) == getattr(in_memory, name), name
    for part in ("train", "validation"):
        one, other = getattr(in_memory, part), getattr(on_disk, part)
        assert len(one) == len(other) > 0
        for left, right in zip(one, other, strict=True):
            assert left.row == right.row and len(left.sides) == len(right.sides)
            for first, second in zip(left.sides, right.sides, strict=True):
                np.testing.assert_array_equal(first.ids_T, second.ids_T)
                np.testing.assert_array_equal(first.weight_T, second.weight_T)
    assert in_memory.report is not None and on_disk.report is not None
    assert in_memory.report.findings.counts == on_disk.report.findings.counts


@pytest.mark.parametrize(("last", "several"), [(["a"], False), (["a", "b"], True), ([], True)])
def test_choice_of_several_labels_is_reported(
    tmp_path: Path, tiny_model_folder: Path, last: list[str], several: bool
) -> None:
    rows = [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(4)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(r)}\n" for r in (*rows, {"text": "x", "label": last})))
    spec = DataSpec.model_validate({"train": str(path), "validation_share": 0.0})
    chat = find(str(tiny_model_folder)).chat
    made = prepare(spec, None, chat, 256, 0)
    assert ("objective.multi_label" in {name for name, *_ in made.choices}) == several
    if several:
        asked = OBJECTIVES["classification"].model_validate({"multi_label": True})
        names = [name for name, *_ in prepare(spec, asked, chat, 256, 0).choices]
        assert "objective.multi_label" not in names


def test_rows_with_tokens_beyond_the_embeddings_are_refused(
    tmp_path: Path, new_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = new_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<hub>"])
    chat, objective = ChatFormat.of(tokenizer), OBJECTIVES["sft"]()
    data = tmp_path / "rows.jsonl"

    def prepared(*prompts: str) -> int:
        rows = [{"prompt": prompt, "completion": "In Ghent."} for prompt in prompts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = DataSpec(train=data, validation_share=0)
        return len(prepare(spec, objective, chat, 256, 0, vocabulary=size).train)

    # Published tokenizers have added tokens that no row uses, such as Gemma 3's image token.
    assert prepared("Where is it?", "Where is this?") == 2
    with pytest.raises(DataError) as refused:
        prepared("Where is it?", "Where is <hub>?")
    problem = refused.value.problems[0]
    assert (problem.rule, problem.line) == ("row.token", 2)


def test_smaller_train_share_is_subset_of_larger_share(tmp_path: Path, family_folder: Any) -> None:
    labelled = tmp_path / "rows.jsonl"
    words = ("late today", "lost it", "a fee")
    lines = [
        {"text": f"card {n} {words[n % 3]} {'again' * (n % 4)}", "label": words[n % 3][:4]}
        for n in range(96)
    ]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chat = find(str(family_folder("bert"))).chat

    def rows_of(share: float | None) -> tuple[Counter[bytes], int]:
        spec = DataSpec(train=str(labelled), validation_share=0.25, train_share=share)
        data = prepare(spec, None, chat, 64, seed=0)
        return Counter(each.ids_T.tobytes() for each in data.train), len(data.validation)

    whole, half, eighth = rows_of(None), rows_of(0.5), rows_of(0.125)
    assert whole[1] == half[1] == eighth[1] == 24
    assert [each[0].total() for each in (whole, half, eighth)] == [72, 36, 9]
    assert eighth[0] <= half[0] <= whole[0]


def test_split_seed_fixes_held_out_rows(tmp_path: Path, family_folder: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"card {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40))
    )
    base = find(str(family_folder("bert")))

    def held_out(seed: int, split_seed: int | None) -> Any:
        recipe = Recipe.parse(
            {
                "base": base.id,
                "data": {"train": str(rows), "validation_share": 0.25, "split_seed": split_seed},
                "training": {"seed": seed},
            }
        )
        return prepare_job(recipe, base, choose_machine(), Reporter()).data.held_out

    assert held_out(0, None) != held_out(1, None)
    assert held_out(0, 0) == held_out(1, 0) == held_out(0, None)
