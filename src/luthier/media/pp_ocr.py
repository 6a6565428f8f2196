"""Conversion of PP-OCR's CTC text recognizer from ONNX into a Hugging Face folder.

The network is transformers' ``PPOCRV6SmallRecForTextRecognition``: convolutions (PP-LCNetV4), two
transformer layers over the columns of a line (SVTR, Du et al. 2022, arXiv:2205.00159), and a linear
layer with scores of all letters for each column. Weights have other names in the ONNX file and the
same order. Batch norms of the convolutional part are merged into biases there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.inputs import save_processor
from luthier.errors import CorruptFile
from luthier.media.processors import ImageProcessor

HEIGHT, WIDTH = 48, 960
"""Size of a line in pixels. PP-OCR reads lines of any width; a batch here has one width."""
CONFIG: dict[str, Any] = {
    "model_type": "pp_ocrv6_small_rec",
    "image_size": [HEIGHT, WIDTH],
    "head_out_channels": 18710,
}
_WEIGHTS = ("conv2d_", "batch_norm2d_", "linear_", "helper.reshape.", "p2o.pd_op.reshape.")
"""Prefixes of the names of weights in the file. Other arrays are constants of the graph."""


def convert_pp_ocr(name: str, folder: Path, target: Path) -> None:
    """Write the network in the ONNX file ``folder/name`` as a Hugging Face folder in float32.

    Raises:
        CorruptFile: if the file contains another network.
    """
    import torch
    from transformers import PPOCRV6SmallRecConfig, PPOCRV6SmallRecForTextRecognition

    letters, arrays = _read_onnx((folder / name).read_bytes())
    fields = {key: value for key, value in CONFIG.items() if key != "model_type"}
    network: Any = PPOCRV6SmallRecForTextRecognition(PPOCRV6SmallRecConfig(**fields))
    network.config.letters = letters
    weights = _weights(network)
    problem = f"{folder / name} contains another network"
    try:
        with torch.no_grad():
            for weight, array in zip(weights, arrays, strict=True):
                stored = torch.from_numpy(array)
                # ONNX multiplies rows by linear layers, and torch by their transpose.
                turn = weight.dim() == 2
                weight.copy_(stored.view(weight.shape[::-1]).T if turn else stored.view_as(weight))
            first = network.model.backbone.encoder.convolution.stem1.convolution.weight
            first.copy_(first.flip(1))  # PP-OCR's images are blue, green, red
    except (RuntimeError, ValueError) as error:
        raise CorruptFile(f"{problem}: {error}", rule="base.format") from error
    if len(letters) + 1 != network.config.head_out_channels:
        raise CorruptFile(f"{problem}: {len(letters)} letters", rule="base.format")
    network.save_pretrained(target)
    half = (0.5,) * 3
    save_processor(ImageProcessor(HEIGHT, WIDTH, half, half, "bilinear", pad=True), target)


def _weights(network: Any) -> Iterator[Any]:
    """Yield the weights of the network in the order of the file."""
    from torch import nn

    convolutions = network.model.backbone.modules()
    for module in convolutions:
        if not isinstance(module, nn.Conv2d):
            continue
        yield module.weight
        if module.bias is None:
            module = next(convolutions)  # the batch norm, reduced to a bias
            module.running_var.fill_(1 - module.eps)
        yield module.bias
    encoder = network.head.encoder
    for layer in encoder.conv_block:
        norm = layer.normalization
        yield from (layer.convolution.weight, norm.weight, norm.bias)
        yield from (norm.running_mean, norm.running_var)
    for block in encoder.svtr_block:
        attention = block.self_attn
        parts = (block.layer_norm1, attention.qkv, attention.projection)
        for part in (*parts, block.layer_norm2, block.mlp.fc1, block.mlp.fc2):
            yield from (part.weight, part.bias)
    for part in (encoder.norm, network.head.head):
        yield from (part.weight, part.bias)


def _read_onnx(raw: bytes) -> tuple[str, list[Any]]:
    """Return the letters in an ONNX file, and the flat arrays of weights in the order of the file.

    The field numbers are those of ONNX's ``ModelProto``, ``GraphProto`` and ``TensorProto``.
    """
    letters, arrays = "", list[Any]()
    for number, value in _fields(raw):
        if number == 14:  # metadata
            entry = dict(_fields(value))
            if entry[1] == b"character":
                # The space is the last class, without a line of the list.
                letters = "".join(entry[2].decode().split("\n")) + " "
        if number == 7:  # graph
            tensors = (dict(_fields(tensor)) for place, tensor in _fields(value) if place == 5)
            arrays = [
                np.frombuffer(tensor[9], "<f4").copy()
                for tensor in tensors
                if tensor[8].decode().startswith(_WEIGHTS)
            ]
    return letters, arrays


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message in the format of Protocol Buffers."""
    at = 0

    def number() -> int:
        nonlocal at
        found = shift = 0
        while True:
            byte = raw[at]
            at += 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while at < len(raw):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 2: 0, 5: 4}[key & 7] or number()
        yield key >> 3, raw[at : at + size]
        at += size
