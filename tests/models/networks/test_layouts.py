"""The padded layouts against transformers' own forward, and span corruption against the paper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from luthier.adaptations import ADAPTATIONS
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.tree import build_tree
from luthier.models.load import as_network, load_model
from luthier.models.networks import heads
from luthier.models.networks.layers import layer_names, layer_positions
from luthier.models.networks.layouts import _rectangle
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.types import Example

CPU = torch.device("cpu")
PAIRS = [
    ("What is the capital of France?", "Paris"),
    ("one word, please:", "yes or no"),
    ("x", "y"),
]
ROWS = [
    PromptCompletion("f", n, prompt=prompt, completion=reply)
    for n, (prompt, reply) in enumerate(PAIRS)
]


def test_rectangle_rows_hold_their_nodes() -> None:
    rows = [Example(np.arange(n) + 10 * n, np.zeros(n, np.float32), n) for n in (3, 1, 4)]
    tree = build_tree(rows, share=False)
    mask_RT, slot_M = _rectangle(tree)
    assert mask_RT.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    ids_RT = np.zeros_like(mask_RT)
    ids_RT.reshape(-1)[slot_M] = tree.ids_N
    assert ids_RT.tolist() == [[10, 0, 0, 0], [30, 31, 32, 0], [40, 41, 42, 43]]


def test_encoder_decoder_gradients_match_transformers(
    family_folder: Callable[[str], Path],
) -> None:
    folder = family_folder("t5")
    chat = load_chat_format(folder)
    objective = OBJECTIVES["sft"]()
    examples = [objective.encode(row, n, chat) for n, row in enumerate(ROWS)]
    model: Any = load_model(folder, torch.float32, CPU)
    theirs = copy.deepcopy(model)
    network = as_network(model, CPU, torch.float32)
    total = torch.zeros(())
    for batch in network.batches(examples, 40):
        total = total + objective.loss(network, batch).total
    total.backward()
    expected = torch.zeros(())
    for prompt, reply in PAIRS:
        source = torch.tensor([chat.tokenizer.encode(prompt)])
        labels = torch.tensor([chat.tokenizer.encode(reply)])
        logits = theirs(input_ids=source, labels=labels).logits
        expected = expected + F.cross_entropy(logits[0], labels[0], reduction="sum")
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    grads = {n: w.grad for n, w in theirs.named_parameters()}
    for n, weight in model.named_parameters():
        assert (weight.grad - grads[n]).norm() <= 1e-4 * grads[n].norm() + 1e-6, n


def test_encoder_decoder_streamed_and_batched_replies_match(
    family_folder: Callable[[str], Path],
) -> None:
    from luthier.inference.generation import Generator
    from luthier.models.decoding.sampling import Sampling
    from luthier.models.load import as_network

    folder = family_folder("t5")
    network = as_network(load_model(folder, torch.float32, CPU), CPU, torch.float32)
    generator = Generator(network, load_chat_format(folder))
    prompts = [prompt for prompt, _ in PAIRS]
    sampling = Sampling(max_tokens=12)
    streamed = ["".join(generator.stream(prompt, sampling)) for prompt in prompts]
    assert any(streamed)
    assert generator.replies(prompts, sampling) == streamed


def test_encoder_decoder_layers_form_a_single_stack(family_folder: Callable[[str], Path]) -> None:
    model = load_model(family_folder("t5"), torch.float32, CPU)
    layers = layer_names(model)
    assert layers == [f"{side}.block.{n}" for side in ("encoder", "decoder") for n in range(3)]
    places = layer_positions([n for n, _ in model.named_parameters()], layers)
    assert places["shared.weight"] == 0
    assert places["encoder.block.0.layer.0.SelfAttention.q.weight"] == 1
    assert places["encoder.final_layer_norm.weight"] == 3
    assert places["decoder.block.2.layer.0.SelfAttention.q.weight"] == 6
    assert places["decoder.final_layer_norm.weight"] == 7
    ADAPTATIONS["freeze"].model_validate({"share": 0.5}).attach(model)
    trained = {n.partition(".")[0] for n, w in model.named_parameters() if w.requires_grad}
    assert trained == {"decoder"}


@pytest.mark.parametrize("is_flat", [True, False])
def test_segments_of_a_pair_reach_the_network(is_flat: bool) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "bert", vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, type_vocab_size=2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    own: Any = AutoModelForSequenceClassification.from_config(config).eval()
    own._supports_attention_backend = is_flat
    rows = [
        Example(
            np.arange(5, 5 + size),
            np.zeros(size, np.float32),
            place,
            segment_T=None if segment is None else np.array(segment),
        )
        for place, (size, segment) in enumerate([(6, [0, 0, 0, 1, 1, 1]), (4, None)])
    ]
    with torch.no_grad():
        expected = [
            own(
                input_ids=torch.from_numpy(row.ids_T)[None],
                token_type_ids=torch.from_numpy(
                    np.zeros_like(row.ids_T) if row.segment_T is None else row.segment_T
                )[None],
            ).logits[0]
            for row in rows
        ]
    heads.set_head_kind(own, "sequence_classification")
    network = as_network(own, CPU, torch.float32)
    tree = build_tree(rows, share=network.shares)
    with torch.no_grad():
        found = network.row_scores(network.batch(tree))
    torch.testing.assert_close(found, torch.stack([expected[row] for row in tree.row_R.tolist()]))
