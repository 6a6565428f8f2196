"""A tiny vision-language model in the form of SmolVLM, with tokenizer and image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Template in SmolVLM's form: content is a list of parts, also without an image."""
SPECIAL = [
    "<unk>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
    "<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
]  # fmt: skip
TILE = 16
"""Pixels of a side of a tile. A tile has 4 image tokens."""


def tokenizer() -> Any:
    """Return a byte-level tokenizer with the special tokens of SmolVLM."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["User: Assistant: What is the colour? It is red. blue"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_start|>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def save_base(folder: Path, kind: str = "idefics3", seed: int = 0, splits: bool = True) -> Path:
    """Save a vision-language model with random weights into ``folder``.

    Args:
        kind: ``idefics3`` or ``smolvlm``.
        splits: Split large images into tiles.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    own = tokenizer()
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 512, "initializer_range": 0.15,
        "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": TILE, "patch_size": 4, "initializer_range": 0.2,
    }  # fmt: skip
    config = AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=own.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # large enough that images change the text
        model.model.connector.modality_projection.proj.weight.normal_(std=0.5)
    model.generation_config.eos_token_id = own.eos_token_id
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    names = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    preprocessor = {
        "image_processor_type": f"{names}ImageProcessor",
        "processor_class": f"{names}Processor",
        "do_convert_rgb": True,
        "do_image_splitting": splits,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": TILE},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 2 * TILE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    fields = {"processor_class": f"{names}Processor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(fields))
    return folder
