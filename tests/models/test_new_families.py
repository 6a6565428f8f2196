"""Decoder families without their own code in luthier: training and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from luthier.data.rows import load_rows
from luthier.engine.train import train
from luthier.exports.writer import export
from luthier.inference.generation import Generator
from luthier.library.models import find, load
from luthier.models.load import as_network
from luthier.models.sampling import Sampling
from luthier.recipe import Recipe
from luthier.workflows.capabilities import capabilities

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    # Every second layer of SmolLM3 has no positions.
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, vocab_size=320),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, vocab_size=320),
}
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' -%}{{ '\n' }}<think>\n{{ (m.reasoning_content or '') | trim }}\n"
    "</think>\n\n{{ m.content }}{%- else -%}{{ '\n' + m.content }}{%- endif -%}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{%- endif -%}"
)
"""ChatML with an empty reasoning block before each reply, as in both families."""
ROWS = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("fox", "dog", "cat")]
PROMPTS = ["say fox", "The quick brown"]


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_without_code_of_its_own_is_tuned_and_exported(
    family: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base, data = tmp_path / family, tmp_path / "rows.jsonl"
    torch.manual_seed(0)
    tokenizer = new_tokenizer(TEMPLATE)
    plain: Any = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    able = {
        (each.objective, each.adaptation)
        for each in capabilities(str(base)).verdicts
        if not each.reason
    }
    assert {("sft", "lora"), ("sft", "full"), ("dpo", "lora"), ("grpo", "lora")} <= able

    adaptation = {"method": "lora", "rank": 4, "alpha": 9.5}
    training = {"max_steps": 12, "learning_rate": 0.02, "precision": "float32", "threads": 1}
    result = train(
        Recipe.parse(
            {
                "base": str(base), "name": "tuned", "adaptation": adaptation, "training": training,
                "objective": "sft", "data": {"train": str(data), "validation_share": 0},
            }
        )
    )  # fmt: skip
    stored = find(result.model_id)

    # The loss of the first rows, before and after, is that of transformers.
    merged = export(stored, tmp_path / "merged", merged=True)
    losses = []
    for model, folder in ((find(str(base)), base), (stored, merged)):
        objective = stored.objective
        rows = [objective.encode(row, at, model.chat) for at, row in enumerate(load_rows(data))]
        network = as_network(load(model, torch.float32, CPU, objective.head()), CPU, torch.float32)
        ours = objective.parity_loss(network, rows, 1024)
        theirs = mean_loss(AutoModelForCausalLM.from_pretrained(folder), rows)
        assert ours == pytest.approx(theirs, rel=1e-4)
        losses.append(ours)
    assert losses[1] < losses[0] - 1

    adapter = export(stored, tmp_path / "adapter", merged=False)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(merged)(ids).logits, by_peft(ids).logits
        )

    served = Generator.open(stored).replies(PROMPTS, Sampling(max_tokens=12))
    assert served == [greedy(merged, prompt, 12) for prompt in PROMPTS]


def mean_loss(model: Any, rows: list[Any]) -> float:
    total, count = 0.0, 0
    for row in rows:
        learned_T = row.weight_T != 0
        labels = torch.from_numpy(np.where(learned_T, row.ids_T, -100))[None]
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(row.ids_T)[None], labels=labels).loss
        total, count = total + float(loss) * int(learned_T.sum()), count + int(learned_T.sum())
    return total / count


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
