"""Transformer-XL compared with the paper's equations, implemented with loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F

from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head
from luthier.models.tokenizer import load_chat_format

CPU = torch.device("cpu")
LAYERS, HEADS, WIDTH, HEAD = 3, 4, 32, 8
SEGMENT, MEMORY = 8, 6


@pytest.fixture
def network(tiny_transfo_xl: Callable[..., Any]) -> Any:
    model = tiny_transfo_xl().double().eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # initial ones and zeros would hide a missing norm
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


def sinusoid(distance: int) -> Tensor:
    angles = [distance / 10000 ** (2 * i / WIDTH) for i in range(WIDTH // 2)]
    waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(waves, dtype=torch.float64)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) + bias


def attention(w: dict[str, Tensor], at: str, h: Tensor, earlier: Tensor) -> Tensor:
    """Return section 3.3 for one segment ``h [I, H]`` after ``earlier [M, H]``, score by score."""
    seen = torch.cat([earlier, h])
    u, v = w["model.attention_biases"]
    out = torch.zeros_like(h)
    for i in range(len(h)):
        for head in range(HEADS):
            part = slice(head * HEAD, (head + 1) * HEAD)
            query = w[at + "q_proj.weight"][part] @ h[i]
            scores, values = [], []
            for j in range(len(earlier) + i + 1):
                key = w[at + "k_proj.weight"][part] @ seen[j]
                far = w[at + "r_proj.weight"][part] @ sinusoid(len(earlier) + i - j)
                score = query @ key + query @ far + u[head] @ key + v[head] @ far
                scores.append(score / math.sqrt(HEAD))
                values.append(w[at + "v_proj.weight"][part] @ seen[j])
            out[i, part] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out @ w[at + "o_proj.weight"].T


def by_the_paper(w: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """Return logits ``[T, V]``, segment by segment, with the paper's memory."""
    table_VH = w["model.embed_tokens.weight"]
    memory = [torch.zeros(0, WIDTH, dtype=torch.float64)] * LAYERS
    rows = []
    for segment in ids_T.split(SEGMENT):
        h = table_VH[segment] * math.sqrt(WIDTH)
        for layer in range(LAYERS):
            at = f"model.layers.{layer}."
            mixed = attention(w, at + "self_attn.", h, memory[layer])
            memory[layer] = torch.cat([memory[layer], h])[-MEMORY:]
            norm = at + "attention_norm."
            o = layer_norm(h + mixed, w[norm + "weight"], w[norm + "bias"])
            inner = (o @ w[at + "mlp.up_proj.weight"].T + w[at + "mlp.up_proj.bias"]).clamp(min=0)
            outer = inner @ w[at + "mlp.down_proj.weight"].T + w[at + "mlp.down_proj.bias"]
            h = layer_norm(o + outer, w[at + "norm.weight"], w[at + "norm.bias"])
        rows.append(h)
    return torch.cat(rows) @ table_VH.T


@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_logits_match_paper_equations(size: int, network: Any) -> None:
    ids_T = ids_of(size)
    expected = by_the_paper(dict(network.state_dict()), ids_T)
    with torch.no_grad():
        got = network(ids_T[None]).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_token_sees_through_several_segments_and_not_further(network: Any) -> None:
    """Each layer extends the context by the memory: three layers, 3 x 6 states."""
    ids_T = ids_of(33)
    with torch.no_grad():
        before = network(ids_T[None]).logits[0, -1]  # token 32, the first of its segment
        reached = []
        for place in range(33):
            changed = ids_T.clone()
            changed[place] = (changed[place] + 1) % 320
            if not torch.equal(network(changed[None]).logits[0, -1], before):
                reached.append(place)
    # 32 sees 26 … 32; 26 is in the segment of 24, which sees 18 …; 18 is in that of 16, sees 10 ….
    assert reached == list(range(10, 33))


def test_no_gradient_crosses_a_border(network: Any) -> None:
    ids_1T = ids_of(1, 24)
    embedded = network.model.embed_tokens(ids_1T).detach().requires_grad_()
    out = network.model(inputs_embeds=embedded).last_hidden_state
    out[0, 20].square().sum().backward()
    moved = embedded.grad[0].abs().sum(-1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(16, 21))


def test_gradients_match_sequential_segments(network: Any) -> None:
    """Memory states are constants, but weights get gradients through memory."""
    ids_T = ids_of(19)
    network(ids_T[None]).logits.square().sum().backward()
    got = {name: weight.grad.clone() for name, weight in network.named_parameters()}
    network.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    states: list[Tensor] = []  # of the embeddings and of each layer, for all tokens so far
    for start in range(0, 19, SEGMENT):
        embedded = network.model.embed_tokens(ids_T[start : start + SEGMENT]) * math.sqrt(WIDTH)
        layers = [embedded]
        for index, layer in enumerate(network.model.layers):
            kept = states[index][-MEMORY:].detach() if states else embedded[:0]
            seen = torch.cat([kept, layers[-1]])
            layers.append(one_segment(network, layer, layers[-1], seen))
        total = total + (layers[-1] @ network.model.embed_tokens.weight.T).square().sum()
        pairs = zip(states, layers, strict=True) if states else ()
        states = [torch.cat(pair) for pair in pairs] or layers
    total.backward()
    for name, weight in network.named_parameters():
        # Sinusoids are float32 in the network.
        assert (got[name] - weight.grad).norm() <= 1e-6 * weight.grad.norm(), name


def one_segment(network: Any, layer: Any, h: Tensor, seen: Tensor) -> Tensor:
    """Return one layer on one segment, with scores from a table of distances."""
    attention, (u, v) = layer.self_attn, network.model.attention_biases
    q, k, val = (
        proj(x).view(len(x), HEADS, HEAD).transpose(0, 1)
        for proj, x in (
            (attention.q_proj, h),
            (attention.k_proj, seen),
            (attention.v_proj, seen),
        )
    )
    place = torch.arange(len(seen))
    distance = place[-len(h) :, None] - place
    table = torch.stack([sinusoid(d) for d in range(len(seen))])
    far = attention.r_proj(table).view(len(seen), HEADS, HEAD)[distance.clamp(min=0)]
    scores = (q + u[:, None]) @ k.transpose(1, 2)
    scores = scores + torch.einsum("nid,ijnd->nij", q + v[:, None], far)
    scores = (scores / math.sqrt(HEAD)).masked_fill(distance < 0, -math.inf)
    mixed = attention.o_proj((scores.softmax(-1) @ val).transpose(0, 1).reshape(len(h), WIDTH))
    o = layer.attention_norm(h + mixed)
    out: Tensor = layer.norm(o + layer.mlp(o))
    return out


def test_padding_on_either_side_leaves_logits_unchanged(network: Any) -> None:
    short, long = ids_of(9), ids_of(19, seed=2)
    ids_4T = torch.zeros(4, 19, dtype=torch.long)
    mask_4T = torch.zeros_like(ids_4T)
    ids_4T[0, :9] = ids_4T[1, 10:] = ids_4T[2, 4:13] = short
    mask_4T[0, :9] = mask_4T[1, 10:] = mask_4T[2, 4:13] = 1
    ids_4T[3], mask_4T[3] = long, 1
    with torch.no_grad():
        alone = network(short[None]).logits[0]
        got = network(ids_4T, attention_mask=mask_4T).logits
        torch.testing.assert_close(got[3], network(long[None]).logits[0])
    for row in got[0, :9], got[1, 10:], got[2, 4:13]:
        torch.testing.assert_close(row, alone)


def test_logits_with_memory_match_full_forward(network: Any) -> None:
    ids_2T, mask_2T = ids_of(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask_2T[1, :3] = 0
    with torch.no_grad():
        whole = network(ids_2T, attention_mask=mask_2T).logits
        out = network(ids_2T[:, :11], attention_mask=mask_2T[:, :11], use_cache=True)
        parts = [out.logits]
        for start, end in ((11, 12), (12, 13), (13, 26), (26, 27), (27, 30)):
            out = network(ids_2T[:, start:end], past_key_values=out.past_key_values, use_cache=True)
            assert out.past_key_values.states[0].shape[1] <= SEGMENT + MEMORY - 1
            parts.append(out.logits)
        kept = network(ids_2T[:1], logits_to_keep=2).logits
    joined = torch.cat(parts, 1)
    torch.testing.assert_close(joined[0], whole[0])
    torch.testing.assert_close(joined[1, 3:], whole[1, 3:])
    torch.testing.assert_close(kept, whole[:1, -2:])


def test_streamed_and_batched_replies_match(
    family_folder: Callable[[str], Path],
) -> None:
    from luthier.inference.generation import Generator
    from luthier.models.decoding.sampling import Sampling
    from luthier.models.load import as_network

    folder = family_folder("transfo_xl")
    network = as_network(load_model(folder, torch.float32, CPU), CPU, torch.float32)
    generator = Generator(network, load_chat_format(folder))
    prompts = ["Hi", "What is the capital of France?", "yes or no"]
    sampling = Sampling(max_tokens=30)
    streamed = ["".join(generator.stream(prompt, sampling)) for prompt in prompts]
    assert len(set(streamed)) > 1
    assert generator.replies(prompts, sampling) == streamed


def test_generation_matches_with_and_without_memory(network: Any) -> None:
    ids_3T, mask_3T = ids_of(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask_3T[0, :7] = mask_3T[2, :2] = 0
    written = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out = network.generate(
            ids_3T,
            attention_mask=mask_3T,
            use_cache=use_cache,
            do_sample=True,
            max_new_tokens=25,
            eos_token_id=None,
            pad_token_id=0,
        )
        written.append(out)
    assert torch.equal(*written)
    assert len(written[0][0].unique()) > 10


def test_training_lowers_the_loss(tiny_transfo_xl: Callable[..., Any]) -> None:
    model = tiny_transfo_xl(initializer_range=0.02)
    ids_BT = ids_of(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(ids_BT).logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_initial_weights_match_authors_code(tiny_transfo_xl: Callable[..., Any]) -> None:
    model = tiny_transfo_xl(hidden_size=256, initializer_range=0.02)
    for weight in (
        model.model.attention_biases,
        model.model.embed_tokens.weight,
        model.model.layers[2].self_attn.r_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_saved_network_comes_back_with_the_same_bits(
    tiny_transfo_xl: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_transfo_xl(seed=3)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float32, CPU)
    assert type(again) is type(model)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    network = as_network(again, CPU, torch.float32)
    assert not network.is_bidirectional and not network.layout.flat


@pytest.mark.parametrize("task", ["embedding", "sequence_classification", "token_classification"])
def test_task_heads_attach_to_transfo_xl(
    task: Any, tiny_transfo_xl: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_transfo_xl().save_pretrained(tmp_path)
    labels = () if task == "embedding" else ("a", "b")
    for dtype in (torch.float32, torch.bfloat16):
        as_network(load_model(tmp_path, dtype, CPU, Head(task, labels)), CPU, dtype)


@pytest.mark.parametrize(
    "field",
    [
        {"num_attention_heads": 5},
        {"segment_length": 0},
        {"memory_length": -1},
        {"tie_word_embeddings": False},
    ],
)
def test_invalid_sizes_are_refused(
    field: dict[str, Any], tiny_transfo_xl: Callable[..., Any]
) -> None:
    with pytest.raises(StrictDataclassError):
        tiny_transfo_xl(**field)


@pytest.mark.parametrize(("segment", "memory"), [(1, 0), (1, 3), (4, 0), (3, 40)])
def test_any_segment_and_memory_can_be_read_onwards(
    segment: int, memory: int, tiny_transfo_xl: Callable[..., Any]
) -> None:
    model = tiny_transfo_xl(segment_length=segment, memory_length=memory).double().eval()
    ids_1T = ids_of(1, 12)
    with torch.no_grad():
        whole, out, parts = model(ids_1T).logits, None, []
        for token in ids_1T.split(1, 1):
            past = None if out is None else out.past_key_values
            out = model(token, past_key_values=past, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
