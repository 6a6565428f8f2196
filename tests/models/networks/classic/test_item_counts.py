"""Vectors of items that were chosen together, as a base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.models.characters import character_tokenizer, token_ids
from luthier.models.networks.classic.item_counts import ItemCountsConfig, ItemCountsModel


def test_inner_products_equal_cosines_of_counts() -> None:
    tokenizer = character_tokenizer(lines=True)
    sizes: dict[str, Any] = token_ids(tokenizer)
    model = ItemCountsModel(ItemCountsConfig(**sizes, hidden_size=8))
    histories = ["bell\nred tyre, 29", "bell\nlamp", "red tyre, 29\nbell\nlamp", "lamp"]
    assert model.fit([np.array(tokenizer(each)["input_ids"]) for each in histories]) == 3
    items = ["bell", "red tyre, 29", "lamp", "tyre"]
    read = tokenizer([*items, "bell\nlamp"], padding=True, return_tensors="pt")
    states_RTH = model(read["input_ids"], read["attention_mask"]).last_hidden_state
    vector_RH = states_RTH.detach().sum(1).numpy()
    counts_NV = np.array(
        [[name in each.split("\n") for name in items] for each in histories], float
    )
    unit_NV = counts_NV / np.maximum(np.sqrt(counts_NV.sum(0)), 1)
    np.testing.assert_allclose(vector_RH[:4] @ vector_RH[:4].T, unit_NV.T @ unit_NV, atol=1e-5)
    np.testing.assert_allclose(vector_RH[4], vector_RH[0] + vector_RH[2], atol=1e-6)
    assert not torch.tensor(vector_RH[3]).any()


def test_base_recommends_items_of_the_same_kind(tmp_path: Path, luthier_home: Path) -> None:
    random = np.random.default_rng(0)
    groups = [[f"{kind} {n}" for n in range(12)] for kind in ("road", "trail")]
    for name, count in (("train", 200), ("test", 40)):
        chosen = [random.permutation(groups[n % 2])[:5].tolist() for n in range(count)]
        rows = [json.dumps({"history": each[:4], "item": each[4]}) for each in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    tuned = luthier.tune(tmp_path / "train.jsonl", base="item-counts", name="shop")
    assert tuned.steps == 0
    found = luthier.evaluate(tuned.model_id, tmp_path / "test.jsonl").scores
    # Eight items of the kind are left: the history is left out.
    assert next(iter(found)) == "recall_at_10" and found["recall_at_10"] == 1
    assert found["recall_at_1"] == pytest.approx(1 / 8, abs=0.15)
    # A new home, such as after an upgrade, opens the fitted network before the base.
    shutil.rmtree(luthier_home / "probes")
    assert luthier.evaluate(tuned.model_id, tmp_path / "test.jsonl").scores == found
