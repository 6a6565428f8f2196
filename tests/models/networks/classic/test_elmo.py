"""ELMo compared with the papers' formulas and torch's LSTM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from luthier.models.characters import character_tokenizer, token_ids
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head, head_weights

CPU = torch.device("cpu")
SIZE, CELLS = 16, 32
TEXT = "The bank, the river bank: naïve 日本 extraordinarily!"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def drawn(model: Any) -> Any:
    """Return the network with random biases and layer weights, so that each has an effect."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "mix.weights", "gamma")):
            weight.data.add_(torch.randn(weight.shape, generator=generator) / 2)
    return model.double().eval()


@pytest.fixture
def network(tiny_elmo: Callable[..., Any]) -> Any:
    return drawn(tiny_elmo(kind="ElmoModel"))


def words_of(tokenizer: Any, text: str) -> list[list[int]]:
    """The characters of each word, cut to 11 and closed."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("Ġ", "[E]"))
    words: list[list[int]] = []
    for token in tokenizer.encode(text):
        if token == start or token < 4:
            words.append([])
        words[-1].append(token)
    return [word[:11] + [end] for word in words]


def word_vector(w: dict[str, Tensor], word: list[int]) -> Tensor:
    """Kim et al. 2016, section 2.2 and 2.3, window by window."""
    embedded = w["characters.embed_tokens.weight"][torch.tensor(word)]
    found = []
    for index, width in enumerate((1, 2, 3)):
        kernel_FEW = w[f"characters.convolutions.{index}.weight"]
        bias_F = w[f"characters.convolutions.{index}.bias"]
        windows = []
        for first in range(len(word)):
            total_F = bias_F.clone()
            for offset in range(width):
                if first + offset < len(word):
                    total_F += kernel_FEW[:, :, offset] @ embedded[first + offset]
            windows.append(total_F.clamp(min=0))
        found.append(torch.stack(windows).max(0).values)
    y = torch.cat(found)
    for index in range(2):
        at = f"characters.highways.{index}."
        gate = torch.sigmoid(w[at + "gate.weight"] @ y + w[at + "gate.bias"])
        new = (w[at + "transform.weight"] @ y + w[at + "transform.bias"]).clamp(min=0)
        y = gate * new + (1 - gate) * y
    return w["characters.projection.weight"] @ y + w["characters.projection.bias"]


def torch_lstm(w: dict[str, Tensor], at: str, x_WP: Tensor) -> Tensor:
    """torch's LSTM with the same matrices."""
    lstm = nn.LSTM(SIZE, CELLS, proj_size=SIZE).double()
    lstm.weight_ih_l0.data = w[at + "inputs.weight"]
    lstm.bias_ih_l0.data = w[at + "inputs.bias"]
    lstm.weight_hh_l0.data = w[at + "recurrent.weight"]
    lstm.bias_hh_l0.data.zero_()
    lstm.weight_hr_l0.data = w[at + "projection.weight"]
    states: Tensor = lstm(x_WP)[0]
    return states


def by_the_paper(w: dict[str, Tensor], words: list[list[int]]) -> list[Tensor]:
    """``h_0``, ``h_1`` and ``h_2`` of each word, ``[W, 2 P]``."""
    x_WP = torch.stack([word_vector(w, word) for word in words])
    ahead, back = x_WP, x_WP
    layers = [torch.cat([x_WP, x_WP], 1)]
    for index in range(2):
        at = f"layers.{index}."
        new_ahead = torch_lstm(w, at + "forwards.", ahead)
        new_back = torch_lstm(w, at + "backwards.", back.flip(0)).flip(0)
        if index:
            new_ahead, new_back = new_ahead + ahead, new_back + back
        ahead, back = new_ahead, new_back
        layers.append(torch.cat([ahead, back], 1))
    return layers


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_states_match_paper_formulas(network: Any, tokenizer: Any) -> None:
    ids_T = torch.tensor(tokenizer.encode(TEXT))
    words = words_of(tokenizer, TEXT)
    assert max(map(len, words)) == 12 and len({tuple(word) for word in words}) < len(words)
    with torch.no_grad():
        w = dict(network.state_dict())
        layers = by_the_paper(w, words)
        share = torch.softmax(w["mix.weights"], 0)
        expected = w["mix.gamma"] * sum(s * h for s, h in zip(share, layers, strict=True))
        got_TH = network(ids_T[None]).last_hidden_state[0]
        network.mixed = False
        top_TH = network(ids_T[None]).last_hidden_state[0]
    starts = (ids_T == network.config.word_start_id) | (ids_T < 4)
    word_T = starts.cumsum(0) - 1
    assert word_T[-1] + 1 == len(words)
    torch.testing.assert_close(got_TH, expected[word_T])
    torch.testing.assert_close(top_TH, layers[2][word_T])


def test_each_direction_sees_a_single_side(network: Any, tokenizer: Any) -> None:
    network.mixed = False
    ids_1T = torch.tensor([tokenizer.encode("one two three four")])
    start = int((ids_1T[0] == tokenizer.convert_tokens_to_ids("Ġ")).nonzero()[2])  # "three"
    changed = ids_1T.clone()
    changed[0, start + 1] += 1
    with torch.no_grad():
        before, after = (network(ids).last_hidden_state[0] for ids in (ids_1T, changed))
    same = before == after
    assert same[:start, :SIZE].all() and not same[start:, :SIZE].any(1).any()
    end = start + len("Ġthree")
    assert same[end:, SIZE:].all() and not same[:end, SIZE:].any(1).any()


def test_padding_on_either_side_leaves_states_unchanged(network: Any, tokenizer: Any) -> None:
    short, long = (torch.tensor(tokenizer.encode(text)) for text in ("a bank", TEXT))
    size = len(short)
    ids_3T = torch.zeros(3, len(long), dtype=torch.long)
    mask_3T = torch.zeros_like(ids_3T)
    ids_3T[0, :size] = ids_3T[1, -size:] = short
    mask_3T[0, :size] = mask_3T[1, -size:] = 1
    ids_3T[2], mask_3T[2] = long, 1
    with torch.no_grad():
        got = network(ids_3T, mask_3T).last_hidden_state
        alone, whole = (network(ids[None]).last_hidden_state[0] for ids in (short, long))
    torch.testing.assert_close(got[0, :size], alone)
    torch.testing.assert_close(got[1, -size:], alone)
    torch.testing.assert_close(got[2], whole)


def test_unseen_words_differ_by_spelling(network: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        a, b = (
            network(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0, 1]
            for text in ("blorft", "blorfs")
        )
    assert not torch.equal(a, b)


def test_initial_weights_match_authors_code(tiny_elmo: Callable[..., Any]) -> None:
    model = tiny_elmo(kind="ElmoModel", projection_size=128, cell_size=256)
    for highway in model.characters.highways:
        assert (highway.gate.bias == -2).all() and (highway.transform.bias == 0).all()
    lstm = model.layers[1].backwards
    bias = lstm.inputs.bias.view(4, -1)
    assert (bias[1] == 1).all() and (bias[[0, 2, 3]] == 0).all()
    assert lstm.recurrent.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert model.mix.gamma.item() == 1 and (model.mix.weights == 0).all()


@pytest.mark.parametrize("task", ["embedding", "sequence_classification", "token_classification"])
def test_task_heads_and_layer_mix(task: Any, tiny_elmo: Callable[..., Any], tmp_path: Path) -> None:
    tiny_elmo().save_pretrained(tmp_path)
    labels = () if task == "embedding" else ("a", "b")
    model = load_model(tmp_path, torch.float32, CPU, Head(task, labels))
    own = {"model.mix.gamma", "model.mix.weights", "score.weight", "score.bias"}
    assert head_weights(model) == (own if labels else set())
    network = as_network(model, CPU, torch.float32)
    assert network.is_bidirectional and not network.layout.flat
    half = load_model(tmp_path, torch.bfloat16, CPU, Head(task, labels))
    as_network(half, CPU, torch.bfloat16)  # compares with the network's own forward


def test_a_saved_network_comes_back_with_the_same_bits(
    tiny_elmo: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_elmo(seed=3)
    model.save_pretrained(tmp_path)
    head = Head("bidirectional_lm", tuple("abcde"))
    again = load_model(tmp_path, torch.float32, CPU, head)
    assert type(again) is type(model)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_head_for_different_words_is_reinitialized(
    tiny_elmo: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_elmo(seed=3)
    model.save_pretrained(tmp_path)
    head = Head("bidirectional_lm", tuple("abcdefgh"))
    again: Any = load_model(tmp_path, torch.float32, CPU, head)
    assert again.lm_head.weight.shape == (8, SIZE) and again.lm_head.weight.std() > 0
    assert torch.equal(
        again.model.characters.projection.weight, model.model.characters.projection.weight
    )


def test_the_sizes_of_the_paper_are_the_default() -> None:
    from luthier.models.networks.classic.elmo import ElmoConfig, ElmoModel

    with torch.device("meta"):
        model = ElmoModel(ElmoConfig())
    assert model.config.hidden_size == 1024
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(93.6e6, rel=0.005)


@pytest.mark.parametrize(
    "field",
    [{"filters": []}, {"filters": [[1]]}, {"projection_size": 32}, {"max_characters_per_token": 2}],
)
def test_invalid_sizes_are_refused(field: dict[str, Any], tiny_elmo: Callable[..., Any]) -> None:
    with pytest.raises(StrictDataclassError):
        tiny_elmo(**field)


def test_tokenizer_matches_default_sizes(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from luthier.models.networks.classic.elmo import ElmoConfig

    found, config = token_ids(tokenizer), ElmoConfig().to_dict()
    assert found == {name: config[name] for name in found}
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_words_split_at_space_and_punctuation(tokenizer: Any) -> None:
    encoded = tokenizer(["U.S.", "naïve"], is_split_into_words=True)
    tokens = encoded.tokens()
    assert tokens[0] == "[S]" and tokens[-1] == "[/S]"
    assert [n for n, token in enumerate(tokens) if token == "Ġ"] == [1, 3, 5, 7, 9]
    assert encoded.word_ids() == [None, *[0] * 8, *[1] * 7, None]
    assert tokenizer.unk_token_id not in encoded["input_ids"]
