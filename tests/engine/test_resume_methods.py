"""Exact resume for methods with state beyond weights: random masks, frozen layers, prompts.

An exception in the middle of a step ends the run and leaves the same files as a kill (real kills
are in ``test_resume.py``). The resumed run is compared with an uninterrupted run. The uninterrupted
run has rows in lists, the resumed run has rows on disk, as large data sets have.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from luthier.data import disk_sequence as spool
from luthier.engine import embedding_rows
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import Reporter
from luthier.engine.train import train
from luthier.objectives.distillation.teacher import TopK
from luthier.recipe import Recipe

TEXTS = [f"the {word} is {place}" for word in ("fox", "dog", "card") for place in ("here", "lazy")]
CASES = {
    "masks are drawn anew": ("bert", "masked_lm", "full", {"mask_share": 0.4}),
    "dropout above a frozen bottom": ("bert", "classification", "freeze", {}),
    "features computed ahead": ("roberta", "classification", "feature_extraction", {}),
    "a soft prompt": ("llama", "sft", "prompt", {}),
    "magnitudes": ("llama", "sft", "lora", {}),
    "layer-wise rates": ("gpt2", "sft", "full", {}),
    "layers that start later": ("bert", "classification", "full", {}),
    "words of every step": ("bert", "classification", "full", {}),
    "a packed base": ("llama", "sft", "qlora", {}),
    "a few weights of each layer": ("llama", "sft", "sparse", {}),
    "mixed rows": ("bert", "classification", "full", {}),
    "labels that spread": ("bert", "semi_supervised", "full", {"neighbours": 3}),
    "a dropout that was asked for": ("gpt2", "classification", "lora", {}),
    "weights that matter": ("llama", "sft", "sparse", {}),
    "keys and values": ("gpt2", "sft", "prefix", {}),
    "a teacher's likeliest tokens": (
        "llama",
        "logit_distillation",
        "lora",
        {"teacher": "gpt2", "cache_top_k": 5, "mix": 0.2, "temperature": 2.0},
    ),
    "answers of the student": (
        "llama",
        "on_policy_distillation",
        "full",
        {"teacher": "gpt2", "max_tokens": 5, "student_share": 0.7},
    ),
    "answers beside what has read the reply": ("gpt2", "sdft", "lora", {"max_tokens": 5}),
    "pairs and a reference": ("llama", "dpo", "lora", {"beta": 0.5}),
    "pairs above a frozen bottom": ("llama", "dpo", "freeze", {"loss_type": "ipo"}),
    "thumbs and mismatched answers": ("gpt2", "kto", "lora", {}),
    "a reward": ("bert", "reward_model", "full", {}),
    "completions that are drawn": ("llama", "grpo", "lora", {"beta": 0.1, "num_iterations": 2}),
    "noise of images": ("vae", "vae", "full", {"kl_warmup": 0.8}),
    "two players": ("dcgan", "gan", "full", {}),
    "views of images": ("small_cnn", "contrastive", "full", {}),
    "norms and dropout of VGG": ("vgg", "classification", "full", {}),
    "features of images": ("vgg", "classification", "feature_extraction", {}),
    "masks of spectrograms": ("ast", "classification", "lora", {}),
    "layers that are left out": ("wav2vec2", "classification", "full", {}),
    "features of sounds": ("wav2vec2", "classification", "feature_extraction", {}),
    "a scale that is learned": ("clip", "contrastive", "full", {}),
    "degraded images": ("unet", "restoration", "full", {}),
    "noise of every step": ("unet", "diffusion", "full", {"condition_dropout": 0.3}),
    "latents and captions": ("stable_diffusion", "diffusion", "lora", {"condition_dropout": 0.3}),
    "letters of columns": ("trocr", "image_to_text", "full", {"ctc_weight": 0.5}),
    "columns without a decoder": ("pp_ocr", "image_to_text", "lora", {}),
    "a value head": ("gpt2", "ppo", "full", {"num_mini_batches": 2}),
}


WRITES = ("grpo", "ppo")
GRADED = {"grader": {"method": "regex", "pattern": "[a-l]"}, "max_completion_tokens": 5}


SEEN = {"leakage.many": "note"}
"""Validation rows equal training rows, which does not matter here."""


class Broken(Exception):
    """End of the first run."""


class BreakingReporter(Reporter):
    """Raises in the middle of the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Raise between the line of the step and the checkpoint."""
        if line["event"] == "train" and line["step"] == self.step:
            raise Broken


def rows_for(objective: str, path: Path, family: str = "") -> Path:
    if family in ("ast", "wav2vec2"):
        return write_sounds(path.with_suffix(""))
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    if objective in ("classification", "semi_supervised"):
        rows = [{"text": text, "label": str(n % 2)} for n, text in enumerate(TEXTS)]
    if objective in ("dpo", "reward_model"):
        rows = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in TEXTS]
    if objective == "kto":
        rows = [
            {"prompt": text, "completion": "yes", "label": n % 2 == 0}
            for n, text in enumerate(TEXTS)
        ]
    if objective in ("sft", "sdft", "logit_distillation", "on_policy_distillation", *WRITES):
        rows = [{"prompt": text, "completion": "yes"} for text in TEXTS]
    if objective in ("vae", "gan", "diffusion", "restoration", "contrastive") or family == "vgg":
        images = np.random.default_rng(0).integers(0, 256, (len(TEXTS), 9, 7), dtype=np.uint8)
        np.savez(path.with_suffix(".npz"), images=images, labels=np.arange(len(TEXTS)) % 2)
        return path.with_suffix(".npz")
    if objective == "image_to_text":
        random = np.random.default_rng(0)
        rows = []
        for n, text in enumerate(("yes", "no", "ba", "one", "an", "xy")):
            name = f"{path.stem}-{n}.png"
            pixels = random.integers(0, 256, (9, 7), dtype=np.uint8)
            Image.fromarray(pixels).save(path.with_name(name))
            rows.append({"image": name, "caption": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_sounds(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for n in range(len(TEXTS)):
        (folder / str(n % 2)).mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / str(n % 2) / f"{n}.wav"), "wb") as file:
            file.setparams((1, 2, 8_000, 0, "NONE", ""))
            file.writeframes(random.integers(-9_000, 9_000, 4_000).astype("<i2").tobytes())
    return folder


OFTEN = {
    "masks are drawn anew", "mixed rows", "a teacher's likeliest tokens", "pairs and a reference",
    "two players", "letters of columns",
}  # fmt: skip
"""Methods that store most of the states: random draws, orders, caches, replies, two networks."""
assert set(CASES) >= OFTEN


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in OFTEN else [pytest.mark.slow]) for c in CASES]
)
def test_resumed_run_has_bits_of_uninterrupted_run(
    case: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, objective, adaptation, fields = CASES[case]
    if "teacher" in fields:
        fields = {**fields, "teacher": str(family_folder(fields["teacher"]))}
    data = rows_for(objective, tmp_path / "rows.jsonl", family)
    further = {"magnitudes": {"dora": True}, "weights that matter": {"mask": "fisher"},
               "layers that start later": {"unfreeze_every": 3}}.get(case, {})  # fmt: skip
    rates = {"layer_decay": 0.8} if case == "layer-wise rates" else {}
    rates |= {"dropout": 0.3} if case == "a dropout that was asked for" else {}
    if objective in WRITES:
        fields = {**GRADED, **fields}
    more: dict[str, Any] = {}
    if case == "mixed rows":
        other = rows_for("classification", tmp_path / "more.jsonl")
        more = {"mix": [{"train": other, "weight": 0.7}]}
    if case == "words of every step":
        more = {"augmentation": {"drop": 0.2, "swap": 0.2}}
    if objective == "semi_supervised":
        more = {"mix": [{"train": rows_for("", tmp_path / "texts.jsonl"), "weight": 2}]}
    monkeypatch.setattr(Checkpoints, "due", lambda self, step, size: step % 3 == 0)
    monkeypatch.setattr(embedding_rows, "MIN_NUMBERS", 1)  # small tables, too, by their rows

    def recipe(name: str) -> Recipe:
        return Recipe.parse(
            {
                "base": str(family_folder(family)),
                "name": name,
                "data": {"train": data, "validation": data, "severity": SEEN, **more},
                "objective": {"method": objective, **fields},
                "adaptation": {"method": adaptation, **further},
                "training": {"max_steps": 11, "epochs": 9, "batch_size": 2, "patience": 0, **rates},
            }
        )

    whole = train(recipe("whole"))
    monkeypatch.setattr(spool, "MEMORY_LIMIT", 0)
    with pytest.raises(Broken):
        train(recipe("broken"), reporter=BreakingReporter(8))
    run = luthier_home / "runs" / family / "broken"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    kept = list(run.glob("precomputed/*"))
    assert bool(kept) == ("cache_top_k" in fields)
    monkeypatch.setattr(TopK, "_write", None)  # the stored values are reused
    known: list[Mapping[str, Any]] = []
    resume = Loop.resume

    def resume_and_look(self: Loop, *state: Any) -> None:
        resume(self, *state)
        known.extend(self.measured)

    monkeypatch.setattr(Loop, "resume", resume_and_look)
    again = train(recipe("broken"), resume=True)
    # The state that selects the best weights is restored.
    assert known
    assert all("rows" in line for line in known) or objective not in ("dpo", "semi_supervised")
    assert not (run / "precomputed").exists()
    assert (whole.steps, again.steps) == (11, 11)
    assert again.validation_loss == whole.validation_loss
    for path in Path(whole.model_dir).glob("*.safetensors"):
        one, other = load_file(path), load_file(Path(again.model_dir) / path.name)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert not (run / "activations.bin").exists()
    kept = [path.read_text() for path in run.parent.glob("*/samples.jsonl")]
    writes = objective in (*WRITES, "on_policy_distillation", "sdft")
    assert len(kept) == (2 if writes else 0) and len(set(kept)) <= 1
