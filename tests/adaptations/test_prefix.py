"""Prefix tuning: PEFT's numbers and file, and the same prefix in training and in inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.adaptations import Prefix
from luthier.data.tree import build_tree
from luthier.errors import RecipeError
from luthier.inference.generation import Generator
from luthier.models.decoding.sampling import Sampling
from luthier.models.formats.save import load_adapter, save_adapter
from luthier.models.load import as_network, load_model
from luthier.models.networks import attention
from luthier.models.networks.attention import _flex_mask, plan_attention
from luthier.models.networks.frozen_layer_cache import frozen_layers
from luthier.models.networks.network import Network
from luthier.models.networks.prefix import prefix_cache, prefix_tokens
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification, MaskedLM
from luthier.objectives.logprobs import weighted_nll
from luthier.types import Example
from model_families import DECODERS

CPU = torch.device("cpu")
PREFIX = Prefix(virtual_tokens=5)


def no_gradients(rows: int) -> Any:
    raise AssertionError("a prefix needs no rows to start from")


def rows(count: int = 4) -> list[Example]:
    draw = np.random.default_rng(0)
    made = []
    for row in range(count):
        ids = np.concatenate([[7, 8, 9], draw.integers(10, 60, 3 + row)])
        weight = np.ones(len(ids), dtype=np.float32)
        weight[:3] = 0
        made.append(Example(ids, weight, row))
    return made


def prefix_of(model: Any) -> torch.nn.Parameter:
    (weight,) = (w for n, w in model.named_parameters() if "key_value_prefix" in n)
    return weight


def prefixed(model: Any, seed: int = 3) -> Network:
    """Return a network with a prefix unlike the keys and values of tokens."""
    network = as_network(model, CPU, torch.float32)
    PREFIX.attach(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        prefix_of(model).normal_()
    return network


def in_peft(model: Any, prefix: Tensor, task: str = "CAUSAL_LM") -> Any:
    """Return the network in PEFT, with PEFT's own configuration."""
    import peft

    config = peft.PrefixTuningConfig(num_virtual_tokens=len(prefix), task_type=task)
    wrapped = peft.get_peft_model(model, config)
    own = wrapped.prompt_encoder["default"].embedding.weight
    assert own.shape == prefix.shape
    own.data.copy_(prefix)
    return wrapped.eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_llama: Any, tiny_gpt2: Any) -> Any:
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]()


def test_loss_and_gradient_are_peft_s(model: Any) -> None:
    theirs = copy.deepcopy(model)
    network = prefixed(model)
    prefix = prefix_of(model)
    wrapped = in_peft(theirs, prefix.detach())
    total = sum(weighted_nll(network, batch) for batch in network.batches(rows(), 16))
    total.backward()
    expected = torch.zeros(())
    for row in rows():
        ids = torch.from_numpy(row.ids_T)[None]
        logits = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        kept = torch.from_numpy(row.weight_T) > 0
        logp = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = expected - logp[kept[1:]].sum()
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradient = wrapped.prompt_encoder["default"].embedding.weight.grad
    assert (prefix.grad - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_prefixed_encoders_match_peft(family: str, family_folder: Callable[[str], Path]) -> None:
    head = Classification(labels=("a", "b", "c")).head()
    torch.manual_seed(0)
    model = load_model(family_folder(family), torch.float32, CPU, head).eval()
    theirs = copy.deepcopy(model)
    network = prefixed(model)
    wrapped = in_peft(theirs, prefix_of(model).detach(), "FEATURE_EXTRACTION")
    examples = rows()
    (batch,) = network.batches(examples, 1000)
    with torch.no_grad():
        hidden_NH = network.hidden(batch)
        for example, root in zip(batch.tree.examples, batch.tree.root_R, strict=True):
            ids = torch.from_numpy(example.ids_T)[None]
            cache = wrapped.get_prompt(batch_size=1)
            states = wrapped.base_model.base_model(input_ids=ids, past_key_values=cache)
            found = hidden_NH[root : root + len(example)]
            torch.testing.assert_close(found, states.last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_peft_loads_saved_prefix_with_equal_replies(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    import peft

    model = load_model(tiny_model_folder, torch.float32, CPU)
    prefixed(model)
    save_adapter(model, PREFIX, PREFIX.adapter_config(model, str(tiny_model_folder)), tmp_path)
    wrapped = peft.PeftModel.from_pretrained(
        load_model(tiny_model_folder, torch.float32, CPU), str(tmp_path)
    ).eval()
    again = load_model(tiny_model_folder, torch.float32, CPU)
    load_adapter(again, PREFIX, tmp_path)
    assert torch.equal(prefix_of(again), prefix_of(model))
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        ours = again.eval()(input_ids=ids, past_key_values=prefix_cache(again, 1)).logits
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    network = as_network(again, CPU, torch.float32)
    generator = Generator(network, load_chat_format(tiny_model_folder))
    prompts, sampling = ["Hi", "What is the capital of France?", "a"], Sampling(max_tokens=12)
    for prompt, reply in zip(prompts, generator.replies(prompts, sampling), strict=True):
        ids_T = generator._encode(prompt, sampling, 0)
        ids = torch.from_numpy(ids_T)[None]
        out = wrapped.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=1,
        )
        assert reply == text_of(generator.chat, out[0, len(ids_T) :].tolist())


def test_answers_see_the_prefix_as_training_does(model: Any, tokenizer: Any) -> None:
    """Streamed, in a batch with padding, and token by token from the tree: the same."""
    from luthier.data.conversations.chat import ChatFormat

    network = prefixed(model)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    generator = Generator(as_network(plain, CPU, torch.float32), ChatFormat.of(tokenizer))
    prompts, sampling = ["Hi", "What is the capital of France?", "a"], Sampling(max_tokens=8)
    together = generator.replies(prompts, sampling)
    for prompt, reply in zip(prompts, together, strict=True):
        assert "".join(generator.stream(prompt, sampling)) == reply
        ids = generator._encode(prompt, sampling, 0).tolist()
        before = len(ids)
        while len(ids) < before + 8 and ids[-1] not in generator.chat.stop_ids:
            example = Example(np.array(ids), np.zeros(len(ids), dtype=np.float32), 0)
            batch = network.batch(build_tree([example]))
            with torch.no_grad():
                last = network.logits(network.hidden(batch)[batch.tree.leaf_R])
            ids.append(int(last.argmax()))
        assert reply == text_of(generator.chat, ids[before:])
    bare = Generator(as_network(plain_of(model), CPU, torch.float32), ChatFormat.of(tokenizer))
    assert bare.context == generator.context + prefix_tokens(model)
    assert bare.replies(prompts, sampling) != together


def text_of(chat: Any, ids: list[int]) -> str:
    """The whole characters before the first stop token."""
    stops = [place for place, token in enumerate(ids) if token in chat.stop_ids]
    return str(chat.replies.decode(ids[: stops[0]] if stops else ids)).rstrip("\ufffd")


def plain_of(model: Any) -> Any:
    """Return the same network without prefix."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        if hasattr(module, "key_value_prefix"):
            del module.key_value_prefix
    bare.set_attn_implementation("sdpa")
    return bare


def test_prefix_starts_as_real_tokens(model: Any) -> None:
    """The network with the prefix equals the network with the tokens before each row."""
    plain = copy.deepcopy(model).eval()
    network = as_network(model, CPU, torch.float32)
    torch.manual_seed(5)
    PREFIX.attach(model)
    assert not prefix_of(model).any()
    PREFIX.calibrate(network, no_gradients)
    assert model.config._attn_implementation == attention.NAME
    torch.manual_seed(5)
    drawn = torch.randint(model.config.vocab_size, (5,))
    (row,) = rows(1)
    batch = network.batch(build_tree([row]))
    with torch.no_grad():
        found = network.logits(network.hidden(batch)[: len(row)])
        whole = torch.cat([drawn, torch.from_numpy(row.ids_T)])
        expected = plain(input_ids=whole[None]).logits[0, 5:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prefix_is_a_single_trained_weight(model: Any) -> None:
    prefixed(model)
    trained = [(n, w) for n, w in model.named_parameters() if w.requires_grad]
    assert len(trained) == 1
    assert PREFIX.stored_name(trained[0][0]) == "prompt_embeddings"
    assert prefix_tokens(model) == len(trained[0][1]) == 5
    assert prefix_tokens(copy.deepcopy(model)) == 5
    assert frozen_layers(model) == 0  # no layer can be computed ahead


def test_networks_with_shared_layer_weights_are_refused(
    family_folder: Callable[[str], Path],
) -> None:
    model = load_model(family_folder("albert"), torch.float32, CPU, MaskedLM().head())
    with pytest.raises(RecipeError) as refused:
        PREFIX.attach(model)
    assert refused.value.rule == "adapter.network"


def test_networks_with_shorter_values_than_keys_are_refused() -> None:
    latent = next(each for each in DECODERS if each.model_type == "deepseek_v3")
    with pytest.raises(RecipeError) as refused:
        PREFIX.attach(AutoModelForCausalLM.from_config(latent.config()))
    assert refused.value.rule == "adapter.network"


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_all_queries_attend_to_prefix_in_tiles_and_mask(
    is_bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import create_mask

    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEY_STEP", 2)
    tree = build_tree(rows(), share=not is_bidirectional)
    size = len(tree)
    dense = torch.zeros(size, 3 + size, dtype=torch.bool)
    for group in plan_attention(tree, CPU, torch.float32, is_bidirectional, before=3).groups:
        for query_Q, key_K, mask_QK in zip(
            group.query_BQ, group.key_BK, group.mask_BQK, strict=True
        ):
            for query, mask_K in zip(query_Q, mask_QK, strict=True):
                dense[query, key_K[mask_K == 0]] = True
    plain = torch.zeros(size, size, dtype=torch.bool)
    for group in plan_attention(tree, CPU, torch.float32, is_bidirectional).groups:
        for query_Q, key_K, mask_QK in zip(
            group.query_BQ, group.key_BK, group.mask_BQK, strict=True
        ):
            for query, mask_K in zip(query_Q, mask_QK, strict=True):
                plain[query, key_K[mask_K == 0]] = True
    assert dense[:, :3].all() and torch.equal(dense[:, 3:], plain)
    block = _flex_mask(tree, is_bidirectional, before=3)
    assert torch.equal(create_mask(block.mask_mod, 1, 1, size, 3 + size, "cpu")[0, 0], dense)
