"""Two claims about networks: recurrence against attention, and normalization before or after.

    python benchmarks/network_designs.py DATA [--seeds 1] [--steps 200] [--write]

Networks of about two million weights learn the plays of ``DATA/tinyshakespeare`` from random
weights. The first study gives an LSTM and a Llama sequences of several lengths, with equal tokens
in a step. The second trains GPT (normalization after each sublayer) and GPT-2 (before) with and
without a warm-up of the learning rate. ``docs/network-designs.json`` keeps the results; ``--write``
alone writes the tables and the figure of ``docs/claims.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import luthier
from children import table
from luthier.workflows.figures import draw

ROOT = Path(__file__).parent.parent
PAGE, STORED = ROOT / "docs" / "claims.md", ROOT / "docs" / "network-designs.json"
LENGTHS = (32, 128, 512)
TOKENS, VOCABULARY = 2048, 2048
"""Tokens of a step, and of the tokenizer."""
RATE = 2e-3
DEEP = {"n_embd": 128, "n_layer": 12, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
PLACES = {"after": "openai-gpt", "before": "gpt2"}
"""Family of transformers by the place of the normalization."""
Found = dict[str, Any]


def train(data: Path, network: Mapping[str, Any], length: int, **settings: Any) -> Found:
    """Pretrain a network, and return its validation losses and its speed."""
    began = time.process_time()
    result = luthier.pretrain(
        [str(data / "tinyshakespeare" / "train.jsonl")],
        name=f"design-{time.time_ns()}",
        network=dict(network),
        data__validation=[str(data / "tinyshakespeare" / "test.jsonl")],
        tokenizer__vocabulary=VOCABULARY,
        training={"batch_size": TOKENS // length, "threads": 1, **settings},
    )  # fmt: skip
    lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines if '"validation"' in line]
    return {
        "weights": result.weights,
        "losses": [[line["step"], line["loss"]] for line in measured],
        "lowest": min(line["loss"] for line in measured),
        "tokens_per_second": result.tokens / (time.process_time() - began),
    }


def measure(data: Path, seeds: Iterable[int], steps: int) -> Found:
    """Train all networks."""
    common = {"max_steps": steps, "evaluate_every": max(1, steps // 5)}
    lengths, places = list[Found](), list[Found]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for family in ("lstm", "llama"):
                for length in LENGTHS:
                    network = {"family": family, "size": "tiny", "context": length}
                    found = train(data, network, length, seed=seed, **common)
                    lengths.append({"family": family, "length": length, "seed": seed, **found})
                    print(lengths[-1], flush=True)
            for place, family in PLACES.items():
                config = Path(folder) / f"{family}.json"
                config.write_text(json.dumps({"model_type": family, **DEEP, **NO_DROPOUT}))
                for warmup in (0.0, 0.1):
                    settings = {"warmup_ratio": warmup, "learning_rate": RATE, "seed": seed}
                    found = train(data, {"config": str(config)}, 128, **settings, **common)
                    places.append({"place": place, "warmup": warmup, "seed": seed, **found})
                    print(places[-1], flush=True)
    return {"steps": steps, "lengths": lengths, "places": places}


def grouped(rows: Iterable[Found], *keys: str) -> dict[tuple[Any, ...], list[Found]]:
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean_of(rows: Iterable[Found], key: str) -> float:
    return float(mean(row[key] for row in rows))


def tables(found: Found) -> dict[str, str]:
    """Return the table of each study."""
    lengths = [
        [family, str(length), f"{mean_of(rows, 'weights'):,.0f}", f"{mean_of(rows, 'lowest'):.3f}",
         f"{mean_of(rows, 'tokens_per_second'):,.0f}"]
        for (family, length), rows in grouped(found["lengths"], "family", "length").items()
    ]  # fmt: skip
    places = [
        [place, f"{warmup:.0%}", f"{mean_of(rows, 'lowest'):.3f}"]
        for (place, warmup), rows in grouped(found["places"], "place", "warmup").items()
    ]
    heads = ["family", "tokens of a sequence", "weights", "validation loss", "tokens per CPU s"]
    return {
        "recurrence": table(heads, lengths),
        "normalization": table(["normalization", "warm-up", "validation loss"], places),
    }


def paint_lengths(axes: Any, colours: Mapping[str, str], found: Found) -> None:
    """Draw the loss against the length of a sequence."""
    for family, colour in (("lstm", "point"), ("llama", "front")):
        groups = grouped(found["lengths"], "family", "length")
        losses = [mean_of(groups[family, length], "lowest") for length in LENGTHS]
        axes.plot(LENGTHS, losses, marker="o", color=colours[colour], label=family)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set(xlabel="tokens of a sequence", ylabel="validation loss")


def paint_places(axes: Any, colours: Mapping[str, str], found: Found) -> None:
    """Draw the curves of the runs."""
    for (place, warmup), rows in grouped(found["places"], "place", "warmup").items():
        curves = zip(*(row["losses"] for row in rows), strict=True)
        points = [(each[0][0], mean(loss for _, loss in each)) for each in curves]
        axes.plot(
            *zip(*points, strict=True),
            color=colours["front" if place == "before" else "point"],
            linestyle="-" if warmup else "--",
            label=f"{place}, {'with' if warmup else 'without'} warm-up",
        )
    axes.set(xlabel="step", ylabel="validation loss")


def write_page() -> None:
    """Write the tables of the page and the figures."""
    found, text = json.loads(STORED.read_text()), PAGE.read_text()
    for name, body in tables(found).items():
        mark = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.S)
        text = mark.sub(lambda match, body=body: match[1] + body + "\n" + match[2], text)  # type: ignore[misc]
    PAGE.write_text(text)
    for name, paint in (("recurrence", paint_lengths), ("normalization", paint_places)):

        def painted(axes: Any, colours: dict[str, str], paint: Any = paint) -> None:
            paint(axes, colours, found)
            axes.legend(frameon=False, labelcolor=colours["text"])

        draw(STORED.with_name(f"{name}.svg"), painted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.data:
        found = measure(given.data, range(given.seeds), given.steps)
        STORED.write_text(json.dumps(found, indent=1) + "\n")
    if given.write:
        write_page()


if __name__ == "__main__":
    main()
