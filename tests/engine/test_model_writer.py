"""Failures while storing: a full disk, and a stored model that differs from the trained model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from short_runs import WORDS, manifest_of, write_rows
from stored_files import files_in

from luthier.engine import model_writer, train
from luthier.errors import DoesNotFit, LuthierError, UnknownModel
from luthier.evaluation import parity as parity_check
from luthier.files import read_json, write_json
from luthier.library.models import find
from luthier.models import manifest
from luthier.models.decoding import lora_batch
from luthier.objectives.base import Objective
from luthier.recipe import Recipe
from luthier.types import Example


def no_space(kind: str) -> Exception:
    """Return the error of the system for a full disk, or the error of safetensors (seen on tmpfs)."""
    if kind == "system":
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("save_adapter", "system"),
        ("draw_curves", "safetensors"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("save_adapter", "safetensors"), ("save_format", "system"),
                ("save_format", "safetensors"), ("write_json", "system"),
                ("write_json", "safetensors"), ("draw_curves", "system"),
            )
        ),
    ],
)  # fmt: skip
def test_full_disk_while_storing_leaves_no_model(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    kind: str,
) -> None:
    module = manifest if where == "write_json" else model_writer
    real = getattr(module, where)

    def full(*arguments: Any) -> Any:
        if where != "draw_curves":
            real(*arguments)
            raise no_space(kind)
        from luthier.files import disk_errors

        with disk_errors(luthier_home):
            raise no_space(kind)

    monkeypatch.setattr(module, where, full)
    with pytest.raises(DoesNotFit) as caught:
        train.train(recipe())
    assert caught.value.rule == "disk.full"
    assert caught.value.exit_code == 1
    assert "Free some space, then repeat the command with `--resume`" in str(caught.value)
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]
    assert not [name for name in files_in(luthier_home) if ".tmp-" in name]
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_HOME", str(luthier_home))
    result = train.train(recipe(), resume=True)
    other = train.train(recipe(name="other"))
    assert (
        manifest_of(result)["trained_weights_sha256"]
        == manifest_of(other)["trained_weights_sha256"]
    )


def test_full_disk_while_training_can_be_resumed(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine import checkpoints

    def full(*arguments: Any) -> Any:
        raise no_space("safetensors")

    spec = recipe({"max_steps": 12})
    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(DoesNotFit):
        train.train(spec)
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_HOME", str(luthier_home))
    assert train.train(spec, resume=True).steps == 12


def zero_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name or "mlp" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def not_numbers(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = {name: tensor * float("nan") for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def other_end(folder: Path) -> None:
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": "<|im_start|>"})


@pytest.mark.parametrize(
    ("adaptation", "damage"),
    [
        ("lora", zero_weights),
        ("full", not_numbers),
        ("full", other_end),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("full", zero_weights), ("lora", not_numbers), ("lora", other_end))
        ),
    ],
)
def test_stored_model_must_equal_trained_model(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    adaptation: str,
    damage: Callable[[Path], None],
) -> None:
    last = "save_format" if adaptation == "lora" else "save_network"
    real = getattr(model_writer, last)

    def save(*arguments: Any) -> None:
        real(*arguments)
        damage(arguments[-1])

    spec = recipe({"learning_rate": 0.02, "max_steps": 6}, adaptation=adaptation)
    monkeypatch.setattr(model_writer, "GREEDY_TOKENS", parity_check.GREEDY_TOKENS)
    monkeypatch.setattr(model_writer, last, save)
    rule = "weights.not_finite" if (adaptation, damage) == ("full", not_numbers) else None
    with pytest.raises(LuthierError) as caught:
        train.train(spec)
    assert caught.value.rule == (rule or "model.not_saved")
    assert caught.value.exit_code == 1
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]
    with pytest.raises(UnknownModel):
        find("tiny-llama:x")
    # The run remains: after the fix it stores without a restart.
    monkeypatch.setattr(model_writer, last, real)
    assert train.train(spec, resume=True).steps == 6
    parity = find("tiny-llama:x").manifest.parity
    assert parity is not None
    said = parity.next_tokens
    assert said is not None
    assert said.tokens > 10
    assert said.agreement == 1 and said.mean_kl == pytest.approx(0, abs=1e-6)
    greedy, beside = parity.greedy, parity.greedy_beside_base
    assert greedy is not None and greedy.tokens > 10 and parity.greedy_skipped is None
    assert greedy.agreement == 1 and greedy.mean_kl == pytest.approx(0, abs=1e-6)
    assert (beside is not None) == (adaptation == "lora")
    if beside is not None:
        assert beside.tokens == greedy.tokens and beside.first_difference is None


def test_adapter_without_effect_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged model equals the trained model, but the serving path drops the adapter.

    Also rejected if the training environment merges: other servers may serve the adapter unmerged.
    """
    monkeypatch.setenv("LUTHIER_ADAPTERS", "merged")
    monkeypatch.setattr(
        lora_batch.LoraBatch,
        "model_of",
        lambda batch, adapters: batch.network.model,
    )
    monkeypatch.setattr("luthier.engine.trained_network.try_shared", lambda *args: None)
    with pytest.raises(LuthierError) as refused:
        train.train(recipe({"learning_rate": 0.05, "max_steps": 8}))
    assert refused.value.rule == "model.not_saved"
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]


def test_record_of_model_without_text_generation(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(4) for word in ("fox", "dog")]
    data = write_rows(tmp_path / "labels.jsonl", rows)
    result = train.train(recipe(data={"train": str(data), "validation_share": 0}))
    parity = find(result.model_id).manifest.parity
    assert parity is not None and parity.greedy is None and parity.next_tokens is None
    assert parity.greedy_skipped


@pytest.mark.parametrize(
    ("base", "objective", "columns"),
    [
        ("bert", "contrastive", ("anchor", "positive")),
        pytest.param(
            "llama", "reward_model", ("prompt", "chosen", "rejected"), marks=pytest.mark.slow
        ),
    ],
)
def test_rows_of_two_splits_in_the_parity_check(
    recipe: Callable[..., Recipe],
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    objective: str,
    columns: tuple[str, ...],
) -> None:
    samples: list[Sequence[Example]] = []
    real = Objective.parity_loss

    def record(own: Objective, network: Any, examples: Sequence[Example], budget: int) -> float:
        samples.append(examples)
        return real(own, network, examples, budget)

    monkeypatch.setattr(Objective, "parity_loss", record)
    rows = [{column: f"{WORDS[n]} {column} {n}" for column in columns} for n in range(10)]
    made = recipe(
        {"micro_batch_tokens": 16, "batch_size": 4, "max_steps": 1},
        base=str(family_folder(base)),
        data={"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "validation_share": 0.2},
        objective={"method": objective},
    )
    train.train(made)
    trained, reloaded = samples
    assert len({tuple(row.ids_T) for row in trained}) == 10
    assert [row.row for row in trained] == [row.row for row in reloaded] == [*range(10)]
