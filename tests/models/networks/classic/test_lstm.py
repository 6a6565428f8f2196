"""LSTM language model: padding, states of generation, and initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.models.networks.classic.lstm import LSTMConfig, LSTMForCausalLM


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    model: Any = LSTMForCausalLM(LSTMConfig(vocab_size=40, hidden_size=16))
    return model.double().eval()


def test_padding_on_either_side_does_not_change_logits(network: Any) -> None:
    ids_T = torch.tensor([5, 6, 7])
    alone = network(ids_T[None]).logits[0]
    rows_BT = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    logits = network(rows_BT, attention_mask=(rows_BT != 0).long()).logits
    torch.testing.assert_close(logits[0, :3], alone)
    torch.testing.assert_close(logits[1, 2:], alone)


def test_tokens_after_a_state_have_the_logits_of_the_whole_row(network: Any) -> None:
    whole = network(torch.tensor([[5, 6, 7, 8]])).logits
    rows_BT = torch.tensor([[9, 1, 2], [0, 5, 6]])
    first = network(rows_BT, attention_mask=(rows_BT != 0).long())
    past = first.past_key_values.select(torch.tensor([1]))
    assert past.get_seq_length() == 2
    onward = network(torch.tensor([[7, 8]]), past_key_values=past)
    torch.testing.assert_close(onward.logits, whole[:, 2:])
    assert onward.past_key_values.get_seq_length() == 4


def test_forget_gates_start_open(network: Any) -> None:
    bias = network.model.layers[0].bias_ih_l0 + network.model.layers[0].bias_hh_l0
    assert bias[16:32].tolist() == [1.0] * 16 and not bias[:16].any() and not bias[32:].any()
