"""Tiny checkpoints in the quantized forms that publishers use: MXFP4 (gpt-oss) and FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from model_families import DECODERS, SIZES

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SIZES = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
BLOCK = 16
"""Rows and columns of a block of FP8 weights with one scale."""


def write_quantized(family: str, method: str, tokenizer: Any, folder: Path) -> Path:
    """Write a network of ``family`` with weights quantized by ``method`` and return the folder."""
    torch.manual_seed(0)
    settings = next(each.settings for each in DECODERS if each.model_type == family)
    config = AutoConfig.for_model(family, **{**_SIZES, **settings})
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in [*weights]:
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = _mxfp4(weights.pop(name))
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        if method == "fp8" and name.endswith(("_proj.weight", "_mqa.weight")):
            weights[name], weights[f"{name}_scale_inv"] = _fp8(weights[name].float())
    save_file(weights, path, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": method}
    if method == "fp8":
        fields["quantization_config"] |= {
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _mxfp4(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed numbers ``[E, O, I / 32, 16]`` and exponents ``[E, O, I / 32]``."""
    groups = weight_EIO.mT.float().unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).clamp_min(1e-8).log2().floor() - 2
    scaled = groups / exponent.exp2()[..., None]
    code = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    return packed.to(torch.uint8).contiguous(), (exponent + 127).to(torch.uint8).contiguous()


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers and the scale of each block; the last blocks may be smaller."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / 448
    numbers = (blocks / scale[:, None, :, None]).flatten(0, 1).flatten(1)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scale
