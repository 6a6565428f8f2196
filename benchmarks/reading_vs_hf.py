"""Classification and tagging against the Hugging Face Trainer: losses and final score.

    python benchmarks/reading_vs_hf.py DATA [--rows 800] [--epochs 2] [--test-rows 500]

all-MiniLM-L6-v2 in float32 on Banking77 (accuracy) and NCBI-disease (entity F1). Both sides start
with the same weights and head, and read the same rows in the same order, without dropout, with
AdamW and a cosine schedule; all weights train. One function computes the scores of both sides. The
Trainer runs in this environment, because peft installs accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from children import run, table
from luthier.tasks import CLASSIFICATION, TAGGING

RATE = 3e-4
CASES = {"banking77": (CLASSIFICATION, "accuracy"), "ncbi_disease": (TAGGING, "entity_f1")}


def cut(source: Path, target: Path, count: int) -> Path:
    """Write the first ``count`` rows in an order that depends on a seed alone."""
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line]
    random.Random(0).shuffle(lines)
    target.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return target


def write_start(base: Path, data: Path, folder: Path) -> None:
    """Write the network with a head drawn for the labels of ``data``, and no dropout."""
    import torch

    from luthier.engine.dataset import prepare
    from luthier.models.formats.save import save_network
    from luthier.models.load import load_model
    from luthier.models.tokenizer import load_chat_format
    from luthier.recipe import DataSpec

    chat = load_chat_format(base)
    spec = DataSpec(train=str(data), validation_share=0)
    objective = prepare(spec, None, chat, context=512, seed=0).objective
    torch.manual_seed(0)
    model: Any = load_model(base, torch.float32, torch.device("cpu"), objective.head())
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    folder.mkdir()
    save_network(model, chat, folder)


def luthier(folder: Path, train: Path, test: Path, epochs: int) -> tuple[list[float], list[Any]]:
    """Return the losses of all steps, and the stored model's predictions of the test rows in
    float32."""
    import torch

    import luthier
    from luthier.data.rows import load_rows
    from luthier.engine.machine import Machine
    from luthier.inference.prediction import Predictor
    from luthier.library.models import find
    from luthier.models.load import as_network, load_model

    result = luthier.tune(
        train,
        base=str(folder),
        name="x",
        adaptation="full",
        data__validation_share=0,
        training__epochs=epochs,
        training__batch_size=16,
        training__learning_rate=RATE,
        training__warmup_share=0,
        training__shuffle=False,
        training__precision="float32",
        training__threads=1,
    )
    events = map(json.loads, Path(result.run_dir, "metrics.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["event"] == "train"]
    stored = find(result.model_id)
    objective = stored.objective
    cpu = Machine(torch.device("cpu"), torch.float32, 1, "as the other side")
    model = load_model(stored.folder, cpu.dtype, cpu.device, objective.head())
    network = as_network(model, cpu.device, cpu.dtype)
    reader = Predictor(network, objective, stored.chat, context=512)
    return losses, reader.answers(load_rows(test))


def compared(name: str, data: Path, options: argparse.Namespace, scratch: Path) -> list[str]:
    from luthier.data.rows import load_rows
    from luthier.library.models import find

    scratch.mkdir()
    train = cut(data / name / "train.jsonl", scratch / "train.jsonl", options.rows)
    test = cut(data / name / "test.jsonl", scratch / "test.jsonl", options.test_rows)
    base = find("all-minilm-l6-v2").folder
    os.environ["LUTHIER_HOME"] = str(scratch / "home")
    write_start(base, train, scratch / "start")
    side = [sys.executable, "benchmarks/reading_side.py", str(scratch / "start")]
    side += [str(train), str(test), str(options.epochs), str(RATE)]
    theirs = run(side).report
    losses, answers = luthier(scratch / "start", train, test, options.epochs)
    apart = [abs(a - b) / b for a, b in zip(losses, theirs["losses"], strict=True)]
    for step in sorted({0, 1, 9, 24, 49, 99, len(losses) - 1} & {*range(len(losses))}):
        print(f"{name} step {step + 1}: {losses[step]:.6f} {theirs['losses'][step]:.6f}")
    rows, (task, metric) = load_rows(test), CASES[name]
    found = [task.scores(rows, said)[metric].value for said in (answers, theirs["answers"])]
    keys = ("label", "tags")
    pairs = zip(answers, theirs["answers"], strict=True)
    same = sum(all(a.get(key) == b.get(key) for key in keys) for a, b in pairs)
    return [
        name,
        str(len(losses)),
        *(f"{max(apart[start:stop]):.1e}" for start, stop in ((0, 10), (0, 50), (0, None))),
        f"{losses[0]:.4f} / {theirs['losses'][0]:.4f}",
        f"{losses[-1]:.4f} / {theirs['losses'][-1]:.4f}",
        f"{found[0]:.4f} / {found[1]:.4f}",
        f"{same} of {len(rows)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--case", choices=CASES, action="append")
    options = parser.parse_args()
    home = os.environ.get("LUTHIER_HOME")
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.case or CASES:
            if home is not None:
                os.environ["LUTHIER_HOME"] = home
            else:
                os.environ.pop("LUTHIER_HOME", None)
            out.append(compared(name, options.data, options, Path(scratch) / name))
    header = ["data", "steps", "apart, 10 steps", "50 steps", "all", "first loss", "last loss"]
    print(table([*header, "score (luthier / HF)", "same answers"], out))


if __name__ == "__main__":
    main()
