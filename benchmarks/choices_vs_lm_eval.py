"""Choices scored through the token tree beside lm-evaluation-harness, in float32 on one thread.

Both take turns on the same rows, so that the ratio holds on a busy machine too. Where ``lm_eval`` is
not installed, its algorithm stands in: a forward for each choice.

    python benchmarks/choices_vs_lm_eval.py smollm2-135m-instruct PROBES.jsonl --rows 100 --batch 8
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from luthier.data.rows import load_rows
from luthier.data.shapes import of_shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.engine.machine import open_network
from luthier.serving.evaluation import choice_likelihoods, fit_choices
from luthier.store.models import chat_format, find, room_of

Pairs = list[tuple[str, str]]


def peer(folder: str, batch: int) -> Callable[[Pairs], list[float]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        print("lm_eval is not installed: a forward for each choice instead")
        return lambda pairs: [alone(model, tokenizer, *pair) for pair in pairs]
    harness = HFLM(model, tokenizer=tokenizer, batch_size=batch)

    def score(pairs: Pairs) -> list[float]:
        asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        return [logp for logp, _ in harness.loglikelihood(asked, disable_tqdm=True)]

    return score


@torch.no_grad()
def alone(model: torch.nn.Module, tokenizer: object, context: str, choice: str) -> float:
    context_ids = tokenizer.encode(context)  # type: ignore[attr-defined]
    ids = tokenizer.encode(context + choice)[len(context_ids) :]  # type: ignore[attr-defined]
    logits = model(torch.tensor([context_ids + ids])).logits[0, -len(ids) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--rows", type=int, default=100, help="of each file, spread over it")
    parser.add_argument("--batch", type=int, default=1, help="choices at once in lm_eval")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stored = find(given.model)
    chat, network = chat_format(stored), open_network(stored, precise=True)
    if network.dtype != torch.float32:
        network.model.float()
        network.dtype = torch.float32
    theirs = peer(str(stored.folder), given.batch)
    for file in given.data:
        rows = of_shape(MultipleChoice, load_rows(file))
        assert rows
        rows = [rows[int(n)] for n in np.linspace(0, len(rows) - 1, min(given.rows, len(rows)))]
        same, most, times = 0, 0.0, np.zeros(2)
        ratios = []
        for turn in range(given.turns):
            part = rows[turn :: given.turns]
            began = time.process_time()
            fitted = fit_choices(part, chat, room_of(stored), "error")
            ours = choice_likelihoods(network, fitted.examples)
            middle = time.process_time()
            flat = iter(
                theirs([(prompt, f" {choice}") for row in part for prompt, choice in row.pairs])
            )
            own = np.array([middle - began, time.process_time() - middle])
            times += own
            ratios.append(own[1] / own[0])
            for mine in ours:
                other = [next(flat) for _ in mine]
                logps = [each.logp for each in mine]
                same += int(np.argmax(logps) == np.argmax(other))
                most = max(most, float(np.abs(np.subtract(logps, other)).max()))
        print(
            f"{file}: {len(rows)} rows, {times[0]:.1f} s beside {times[1]:.1f} s, "
            f"{times[1] / times[0]:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"{same / len(rows):.1%} the same picks, log-likelihoods within {most:.1e}"
        )


if __name__ == "__main__":
    main()
