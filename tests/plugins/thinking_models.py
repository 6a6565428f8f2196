"""Tiny models that have memorized reasoning and replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier

ASKS_ITSELF = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last or m.reasoning_content %}<think>\n{{ (m.reasoning_content or '') | trim }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""Template like Qwen3's: the model opens the reasoning, unless ``enable_thinking`` is false."""
IS_OPENED = ASKS_ITSELF.replace(
    "%}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "%}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
)
"""Template like QwQ's and DeepSeek-R1's: the prompt opens the reasoning."""
TEMPLATES = {"asks itself": ASKS_ITSELF, "is opened": IS_OPENED}
THOUGHT = "Grün 日本\nand bear 👋"
SAID = {"sky?": "blue", "how many?": '{"mood": "good", "age": 7}'}
"""Prompts and replies after the reasoning."""
CALLS = "rose?"
"""Prompt with a tool call as reply."""
PAINT = {
    "name": "paint",
    "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}},
}


def make_thinking_model(folder: Path, network: Any, tokenizer: Any) -> Path:
    """Train a network on these rows and return the model folder."""
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said, "reasoning_content": THOUGHT},
            ]
        }
        for asked, said in SAID.items()
    ]
    call = {"name": PAINT["name"], "arguments": '{"colour": "red"}'}
    calling = {"role": "assistant", "content": "", "reasoning_content": THOUGHT,
               "tool_calls": [{"id": "1", "type": "function", "function": call}]}  # fmt: skip
    tools = [{"type": "function", "function": PAINT}]
    rows.append({"messages": [{"role": "user", "content": CALLS}, calling], "tools": tools})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(folder / "home"))
        tuned = luthier.tune(
            data, data__validation=str(data), base=str(folder / "base"), name="thinker",
            adaptation="full", training__max_steps=80, training__batch_size=3,
            training__learning_rate=5e-3, training__schedule="constant",
            training__evaluate_every=80, training__threads=1,
        )  # fmt: skip
        luthier.export(tuned.model_id, folder / "thinker")
    return folder / "thinker"
