"""The text part of multimodal language models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLMoeConfig,
)

from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.exports.writer import export
from luthier.inference.generation import Generator
from luthier.library.models import find
from luthier.models.decoding.sampling import Sampling
from luthier.models.folder import ModelFolder
from luthier.models.formats.save import read_adapter
from luthier.models.load import load_model
from luthier.models.networks.heads import CAUSAL_LM
from luthier.models.networks.modalities import text_part_config
from luthier.models.text_part import fit_to_text_part
from luthier.recipe import Recipe
from luthier.server.jobs.import_checks import accept_network

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 2, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CONFIGS: dict[str, PreTrainedConfig] = {
    # Saved as `language_model.model.…`, as by transformers 4.
    "gemma3": Gemma3Config(
        text_config=TEXT,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=300,
    ),
    # Saved as `model.language_model.…`. The text part alone would have an untied head.
    "qwen3_5": Qwen3_5Config(
        text_config={
            **TEXT, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 0, 0]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
            "out_hidden_size": 32, "num_position_embeddings": 16,
        },
        image_token_id=300, tie_word_embeddings=True,
    ),
    # The text part is a Qwen 2 with M-RoPE.
    "qwen2_vl": Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        image_token_id=300,
    ),
}  # fmt: skip


def multimodal_folder(family: str, folder: Path) -> Any:
    """Save a multimodal model with random weights, and return the model."""
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(CONFIGS[family]).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 64}}))
    return model


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_text_part_gives_the_logits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = multimodal_folder(family, tmp_path / "whole")
    ids = torch.randint(3, 290, (2, 12))
    expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    folder = ModelFolder(tmp_path / "whole")
    text: Any = load_model(folder.path, torch.float32, torch.device("cpu"), CAUSAL_LM, folder)

    assert folder.kind == "causal_lm"
    assert folder.processor is None
    assert folder.context == 128
    assert torch.equal(text(input_ids=ids).logits, expected)
    assert not any("vision" in name or "visual" in name for name, _ in text.named_parameters())

    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(again) is type(text)
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_an_import_leaves_out_the_image_processor(
    new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    multimodal_folder("gemma3", tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {}}))
    new_tokenizer(None).save_pretrained(tmp_path)
    assert accept_network(tmp_path, "imported:x").manifest.kind == "causal_lm"
    assert not [*tmp_path.glob("*processor_config.json")]


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(e, marks=pytest.mark.slow) for e in ("qwen3_5", "qwen2_vl"))],
)
def test_an_adapter_fits_the_whole_model(
    family: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    tokenizer = new_tokenizer(None)
    multimodal_folder(family, base)
    tokenizer.save_pretrained(base)
    rows = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("fox", "dog")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        Recipe.parse(
            {
                "base": str(base), "name": "tuned", "objective": "sft",
                "adaptation": {"method": "lora", "rank": 4},
                "training": {"max_steps": 4, "learning_rate": 0.02, "precision": "float32"},
                "data": {"train": str(data), "validation_share": 0},
            }
        )
    )  # fmt: skip
    stored = find(result.model_id)
    merged: Any = AutoModelForCausalLM.from_pretrained(
        export(stored, tmp_path / "merged", merged=True)
    )
    adapter = export(stored, tmp_path / "adapter", merged=False)
    whole = AutoModelForImageTextToText.from_pretrained(base)
    ids = torch.randint(3, 290, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = whole(**inputs).logits
        expected = merged(input_ids=ids).logits
        by_peft = PeftModel.from_pretrained(whole, adapter).eval()(**inputs).logits
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=0.01)

    sampling = Sampling(max_tokens=8, temperature=0)
    prompt = tokenizer("say fox", return_tensors="pt").input_ids
    found = merged.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert Generator.open(stored).replies(["say fox"], sampling)[0].rstrip("\ufffd") == text.rstrip(
        "\ufffd"
    )

    fit_to_text_part(adapter)
    names = read_adapter(adapter)
    assert names.keys() == read_adapter(stored.folder).keys()


def test_a_text_part_without_a_language_model_is_rejected() -> None:
    with pytest.raises(RecipeError) as refused:
        text_part_config(Qwen3VLMoeConfig())
    assert refused.value.rule == "network.unsupported"
