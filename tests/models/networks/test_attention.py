"""The token tree compared with a plain forward pass per row, with the networks' own eager
attention.

Differences are measured as ``|a - b| / |b|`` in the Euclidean norm of the whole tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from luthier.data.tree import TokenTree, build_tree, pad_tree
from luthier.errors import RecipeError
from luthier.models.load import as_network
from luthier.models.networks import attention
from luthier.models.networks.attention import (
    AttentionPlan,
    AttentionWindow,
    Scoring,
    _flex_mask,
    _TreeAttention,
    plan_attention,
)
from luthier.models.networks.network import Network
from luthier.objectives.logprobs import weighted_nll
from luthier.types import Example

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]

SHAPES = {
    # prefix lengths and, for each, the lengths of the rows' own ends
    "short rows": [(0, [5, 9]), (6, [1, 1, 4]), (3, [12])],
    "many tiles": [(70, [60, 90, 1, 45]), (150, [80, 33, 2])],
    "one long prefix": [(300, [3, 150, 40]), (0, [200])],
}


def make_rows(shape: Sequence[tuple[int, list[int]]], vocabulary: int = 320) -> list[Example]:
    """Return rows with shared prefixes and uneven loss weights at the ends."""
    random = np.random.default_rng(7)
    rows: list[Example] = []
    for prefix_size, ends in shape:
        prefix = random.integers(0, vocabulary, prefix_size)
        for size in ends:
            ids = np.concatenate([prefix, random.integers(0, vocabulary, size)])
            weight = np.zeros(len(ids), dtype=np.float32)
            weight[-size:] = random.choice([0.0, 0.5, 1.0, 2.0], size)
            weight[0], weight[-1] = 0.0, 1.0
            rows.append(Example(ids, weight, len(rows)))
    again = rows[0]
    return [*rows, Example(again.ids_T, again.weight_T, len(rows))]


def each_row_alone(model: Any, rows: Sequence[Example]) -> tuple[list[Tensor], Tensor, Gradients]:
    """Logits of each row, summed loss and gradients, with nothing of luthier in between."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    all_logits, total = [], torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids_T)
        logits = plain(input_ids=ids[None]).logits[0]
        nll = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
        total = total + (nll * torch.from_numpy(row.weight_T[1:])).sum()
        all_logits.append(logits.detach())
    total.backward()
    return all_logits, total.detach(), gradients_of(plain)


def as_one_tree(network: Network, rows: Sequence[Example]) -> tuple[list[Tensor], Tensor]:
    tree = build_tree(rows)
    batch = network.batch(tree)
    with torch.no_grad():
        logits_NV = network.hidden(batch) @ network.head_VH.t()
    leaf_of = dict(zip(tree.row_R.tolist(), tree.leaf_R.tolist(), strict=True))
    total = weighted_nll(network, batch)
    total.backward()
    return [logits_NV[torch.from_numpy(tree.path(leaf_of[row.row]))] for row in rows], total


def gradients_of(model: Any) -> Gradients:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["llama", "tied llama", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_llama: Any, tiny_gpt2: Any) -> Any:
    if request.param == "gpt2":
        return tiny_gpt2()
    return tiny_llama(tied=request.param == "tied llama")


@pytest.mark.parametrize("shape", SHAPES)
def test_tree_matches_single_rows(model: Any, shape: str) -> None:
    rows = make_rows(SHAPES[shape])
    expected_logits, expected_loss, expected = each_row_alone(model, rows)
    logits, loss = as_one_tree(as_network(model, CPU, torch.float32), rows)
    for mine, theirs in zip(logits, expected_logits, strict=True):
        assert difference(mine, theirs) < 1e-5
    assert difference(loss.detach(), expected_loss) < 1e-5
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert difference(grad, expected[name]) < 1e-5, name


def test_shapes_cover_several_tiles_and_crossing_paths() -> None:
    sizes = {name: len(build_tree(make_rows(shape))) for name, shape in SHAPES.items()}
    assert sizes["short rows"] < attention.TILE < 3 * attention.TILE < sizes["many tiles"]
    tree = build_tree(make_rows(SHAPES["one long prefix"]))
    tiles = {
        leaf: {int(node) // attention.TILE for node in tree.path(leaf)} for leaf in tree.leaf_R
    }
    assert any(len(crossed) >= 3 for crossed in tiles.values())
    assert any(
        sorted(crossed) != list(range(min(crossed), max(crossed) + 1)) for crossed in tiles.values()
    )


def small_tree() -> TokenTree:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7], [1, 2, 8, 9, 1], [4], [1, 2, 3, 4, 9]]
    return pad_tree(
        build_tree(
            [
                Example(np.array(ids), np.zeros(len(ids), dtype=np.float32), index)
                for index, ids in enumerate(rows)
            ]
        ),
        5,
    )


def ancestors(tree: TokenTree) -> Tensor:
    """Dense ``[query, key]`` relation, by walking up from each node."""
    seen = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for node in range(len(tree)):
        above = node
        while above >= 0:
            seen[node, above] = True
            above = int(tree.parent_N[above])
    return seen


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "SHORT_TILE", 4)
    monkeypatch.setattr(attention, "KEY_STEP", 3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_attention_matches_masked_softmax(heads: tuple[int, int]) -> None:
    tree = small_tree()
    torch.manual_seed(0)
    query = torch.randn(heads[0], len(tree), 5, dtype=torch.float64)
    key = torch.randn(heads[1], len(tree), 5, dtype=torch.float64)
    value = torch.randn(heads[1], len(tree), 6, dtype=torch.float64)
    group = heads[0] // heads[1]
    scores = torch.einsum("hqd,hkd->hqk", query, key.repeat_interleave(group, 0)) * 0.3
    weights = scores.masked_fill(~ancestors(tree), float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,hkd->qhd", weights, value.repeat_interleave(group, 0))
    plan = plan_attention(tree, CPU, torch.float64)
    assert sum(len(part.query_BQ) for part in plan.groups) == 4
    found = plan.attend(None, query[None], key[None], value[None], Scoring(0.3))[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def within(tree: TokenTree, window: AttentionWindow) -> Tensor:
    """Dense relation of the ancestors in the window."""
    depth_N = torch.from_numpy(tree.depth_N)
    if window.is_chunked:
        return ancestors(tree) & (depth_N[:, None] // window.size == depth_N // window.size)
    return ancestors(tree) & (depth_N[:, None] - depth_N < window.size)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "window",
    [AttentionWindow(1), AttentionWindow(2), AttentionWindow(3), AttentionWindow(2, True)],
    ids=str,
)
def test_window_cap_and_sinks_match_dense_softmax(window: AttentionWindow) -> None:
    tree = small_tree()
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, len(tree), 5, dtype=torch.float64, requires_grad=True)
    sinks_H = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scores = torch.tanh(query @ key.mT * 0.9 / 1.5) * 1.5
    scores = scores.masked_fill(~within(tree, window), float("-inf"))
    sink_HN1 = sinks_H[:, None, None].expand(4, len(tree), 1)
    weights = torch.cat([scores, sink_HN1], -1).softmax(-1)[..., :-1]
    expected = (weights @ value).transpose(0, 1)
    plan = plan_attention(tree, CPU, torch.float64)
    scoring = Scoring(0.9, window, 1.5, sinks_H)
    found = plan.attend(None, query[None], key[None], value[None], scoring)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    inputs = (query, key, value, sinks_H)
    of_tree = torch.autograd.grad((found * weight).sum(), inputs)
    of_dense = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(of_tree, of_dense, rtol=1e-10, atol=1e-12)
    assert plan.within(AttentionWindow(6)) is plan
    assert plan.within(window) is plan.within(window) is not plan


def test_tiles_within_a_window_have_few_keys() -> None:
    plan = plan_attention(build_tree(make_rows([(0, [640])])), CPU, torch.float32)
    keys = [group.key_BK.shape[1] for group in plan.within(AttentionWindow(32)).groups]
    assert max(keys) <= attention.TILE + 32
    assert max(group.key_BK.shape[1] for group in plan.groups) == 640


@pytest.mark.parametrize("small_group", [0, 1 << 30])
def test_short_tiles_and_joint_small_groups(
    small_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SMALL_GROUP", small_group)
    tree = pad_tree(build_tree(make_rows([(12, [20, 40, 60, 33, 5])])), 32)
    plan = plan_attention(tree, CPU, torch.float32)
    assert {group.query_BQ.shape[1] for group in plan.groups} == {attention.SHORT_TILE}
    assert len(plan.groups) == (1 if small_group else 3)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, len(tree), 8, dtype=torch.float32)
    scores = (query @ key.mT).masked_fill(~ancestors(tree), float("-inf"))
    found = plan.attend(None, query[None], key[None], value[None], Scoring(1.0))[0]
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(0, 1))
    whole = plan_attention(build_tree(make_rows([(0, [512])])), CPU, torch.float32)
    assert {group.query_BQ.shape[1] for group in whole.groups} == {attention.TILE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_shared_key_are_summed_in_float32(dtype: torch.dtype) -> None:
    tree = build_tree(make_rows([(1, [30] * 40)]))
    plan = plan_attention(tree, CPU, dtype)
    value = torch.zeros(1, len(tree), 4, dtype=dtype, requires_grad=True)
    nothing = torch.zeros(1, len(tree), 4, dtype=dtype)
    plan.attend(None, nothing[None], nothing[None], value[None], Scoring(1.0)).sum().backward()
    # Uniform attention: the root gets an equal share of every node.
    expected = (1 / torch.from_numpy(tree.depth_N + 1)).sum()
    assert value.grad is not None
    root = value.grad[0, 0]
    torch.testing.assert_close(root, expected.to(dtype).expand(4), rtol=2**-8, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_attention_gradients_pass_gradcheck() -> None:
    tree = small_tree()
    torch.manual_seed(1)
    inputs = [
        torch.randn(heads, len(tree), 2, dtype=torch.float64, requires_grad=True)
        for heads in (2, 1, 1)
    ]
    plan = plan_attention(tree, CPU, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: plan.attend(None, q[None], k[None], v[None], Scoring(0.7)),
        inputs,
        atol=1e-6,
        rtol=1e-6,
    )


def test_backward_pass_saves_only_query_key_value() -> None:
    tree = build_tree(make_rows(SHAPES["many tiles"]))
    plan = plan_attention(tree, CPU, torch.float32)
    assert len(plan.groups) > 1
    query = torch.randn(4, len(tree), 8, requires_grad=True)
    key, value = torch.randn(2, 2, len(tree), 8)
    out = _TreeAttention.apply(query, key, value, None, plan, 1.0, None)
    shapes = [tuple(tensor.shape) for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert shapes == [tuple(tensor.shape) for tensor in (query, key, value)]


@pytest.mark.slow
def test_bfloat16_is_near_float32(tiny_llama: Any) -> None:
    rows = make_rows(SHAPES["many tiles"])
    _, expected_loss, expected = each_row_alone(tiny_llama(), rows)
    model = tiny_llama().to(torch.bfloat16)
    _, loss = as_one_tree(as_network(model, CPU, torch.bfloat16), rows)
    assert difference(loss.detach(), expected_loss) < 0.002
    for name, grad in gradients_of(model).items():
        assert difference(grad, expected[name]) < 0.08, name


SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
    "sliding_window": 20, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]


def tiny(family: str, **other: Any) -> Any:
    torch.manual_seed(0)
    config: Any = transformers.AutoConfig.for_model(family, **SIZES | other)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            weight.data.normal_()
    return model


GEMMA_2 = {
    "head_dim": 8, "layer_types": KINDS, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12,
}  # fmt: skip
GPT_OSS = {"head_dim": 8, "layer_types": KINDS, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "fields"),
    [("mistral", {}), ("gemma2", GEMMA_2), ("gpt_oss", GPT_OSS), ("cohere2", {"logit_scale": 0.3})],
)
def test_rows_beyond_the_window_are_exact(family: str, fields: dict[str, Any]) -> None:
    rows = make_rows([(10, [4, 60, 30]), (0, [20, 90])])
    model = tiny(family, **fields)
    expected_logits, expected_loss, expected = each_row_alone(model, rows)
    network = as_network(model, CPU, torch.float32)
    tree = build_tree(rows)
    batch = network.batch(tree)
    total = weighted_nll(network, batch)
    assert difference(total.detach(), expected_loss) < 1e-5
    total.backward()
    for name, grad in gradients_of(model).items():
        assert difference(grad, expected[name]) < 2e-5, name
    with torch.no_grad():
        logits_NV = network.logits(network.hidden(batch))
    for row, leaf in zip(tree.row_R.tolist(), tree.leaf_R.tolist(), strict=True):
        mine = logits_NV[torch.from_numpy(tree.path(leaf))]
        assert difference(mine, expected_logits[row]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_with_unsupported_scaling_is_refused(dtype: torch.dtype) -> None:
    model = tiny("hyperclovax", logits_scaling=3.0)  # a factor, in other families a divisor
    with pytest.raises(RecipeError) as refused:
        as_network(model.to(dtype), CPU, dtype)
    assert refused.value.rule == "network.unsupported"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_branch_positions_are_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the probe's tokens is its second branch."""
    batch = Network.batch

    def shifted(self: Network, *tree: Any, **how: Any) -> Any:
        made = batch(self, *tree, **how)
        made.depth_N[12:18] += 2  # of the second row, after the shared prefix
        return made

    torch.manual_seed(0)
    model = tiny("mistral").to(dtype)
    as_network(copy.deepcopy(model), CPU, dtype)
    monkeypatch.setattr(Network, "batch", shifted)
    as_network(copy.deepcopy(model), CPU, dtype)  # a trial that was passed is not repeated
    model.config.rms_norm_eps *= 1.01
    with pytest.raises(RecipeError) as refused:
        as_network(model, CPU, dtype)
    assert refused.value.rule == "network.unsupported"


@pytest.mark.parametrize("shape", ["short rows", "many tiles"])
def test_the_gpu_mask_is_the_ancestor_relation(shape: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    tree = pad_tree(build_tree(make_rows(SHAPES[shape])), 32)
    block_mask = _flex_mask(tree, is_bidirectional=False)
    dense = create_mask(block_mask.mask_mod, None, None, len(tree), len(tree), device="cpu")
    assert torch.equal(dense[0, 0], ancestors(tree))
    blocks = block_mask.to_dense()[0, 0].bool()
    tile = block_mask.BLOCK_SIZE[0]
    for row, column in np.ndindex(*blocks.shape):
        part = dense[0, 0, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        assert bool(blocks[row, column]) == bool(part.any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_tree_on_gpu_matches_single_rows(tiny_llama: Callable[..., Any], shape: str) -> None:
    # FlexAttention wants heads of 16 or more.
    model = tiny_llama(hidden_size=64)
    rows = make_rows(SHAPES[shape])
    expected_logits, expected_loss, expected = each_row_alone(model, rows)
    cuda = torch.device("cuda")
    logits, loss = as_one_tree(as_network(model.to(cuda), cuda, torch.float32), rows)
    for mine, theirs in zip(logits, expected_logits, strict=True):
        assert difference(mine.cpu(), theirs) < 1e-3
    assert difference(loss.detach().cpu(), expected_loss) < 1e-3
    for name, grad in gradients_of(model).items():
        assert difference(grad.cpu(), expected[name]) < 1e-2, name


@pytest.mark.parametrize("window", [AttentionWindow(2), AttentionWindow(3, True)], ids=str)
def test_the_gpu_mask_has_the_window(window: AttentionWindow) -> None:
    from torch.nn.attention.flex_attention import create_mask

    tree = small_tree()
    block_mask = _flex_mask(tree, is_bidirectional=False, window=window)
    dense = create_mask(block_mask.mask_mod, None, None, len(tree), len(tree), device="cpu")
    assert torch.equal(dense[0, 0], within(tree, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_the_gpu_kernel_gets_caps_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled: compilation takes longer than this test, and its kernels need a GPU.
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    tree = small_tree()
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(tree), 16) for heads in (4, 2, 2))
    scoring = Scoring(0.9, AttentionWindow(3), 1.5, torch.randn(4))
    expected = plan_attention(tree, CPU, torch.float32).attend(None, query, key, value, scoring)
    mask = _flex_mask(tree, is_bidirectional=False, window=scoring.window)
    plan = AttentionPlan((), 1, block_mask=mask)
    found = plan.attend(None, query, key, value, scoring)
    torch.testing.assert_close(found, expected)
