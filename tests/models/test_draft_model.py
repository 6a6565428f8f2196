"""A draft model guesses ahead, and nobody can tell by what is written: the bits are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adaptations import LoRA, Prefix, Prompt
from luthier.models.draft_model import DraftModel
from luthier.models.heads import prompt_ids
from luthier.models.kv_cache import CHUNK
from luthier.models.load import as_network
from luthier.models.speculation import DraftLength, Speculation
from luthier.models.torch_backend import FlatBackend

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 5 + size) % 300 + 3 for size in (1, 7, 31, 33, 64, 90)]
Made = Callable[..., Any]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def guesses(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``guesses(most)``: as many are made in each step, whatever the clock says; 5 by default."""

    def set_length(most: int) -> None:
        def choose(self: Any, sequences: int, others: int, sizes: Sequence[int]) -> int:
            return max(0, min(most, (sizes[-1] - others) // sequences - 1))

        monkeypatch.setattr(DraftLength, "choose", choose)

    set_length(5)
    return set_length


@pytest.fixture
def network(tiny_llama: Made) -> Made:
    """``network(seed=…)``: a tiny Llama in float32 that steps with any number of rows."""

    def make(attach: Callable[[Any], None] = lambda model: None, **fields: Any) -> Any:
        model = tiny_llama(**fields).eval()
        attach(model)
        return as_network(model, CPU, torch.float32)

    return make


def drawn(adaptation: Any, seed: int = 0) -> Callable[[Any], None]:
    """Attaches ``adaptation`` with weights far from where it starts."""

    def attach(model: Any) -> None:
        torch.manual_seed(seed)
        adaptation.attach(model)
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)

    return attach


def draft_of(network: Any, context: int = 1024, target: Any = None) -> DraftModel:
    """``network`` as a draft; of a target with another vocabulary, ``target``."""
    return DraftModel("draft", FlatBackend(network, context), target or network)


class Texts:
    """Sequences that step together, each with the likeliest tokens, and the logits of all."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.states: dict[int, Any] = {}
        self.ids: dict[int, list[int]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.counted = Speculation()

    def add(self, name: int, prompt: Any, copies: int = 1, backend: Any = None) -> None:
        own = backend or self.backend
        soft = np.array(prompt_ids(own.network.model), dtype=np.int64)
        state, logits = own.open(np.concatenate([soft, prompt])), None
        while logits is None:
            (logits,) = own.prefill([state])
        for copy, each in enumerate(own.fork(state, copies)):
            self.states[name + copy] = each
            # Copies part at once.
            self.ids[name + copy] = [int(logits.topk(copies).indices[copy])]
            self.logits[name + copy] = []

    def step(self, count: int) -> None:
        for _ in range(count):
            rows = self.backend.step(
                [*self.states.values()], [self.ids[n][-1] for n in self.states]
            )
            for name, row in zip(self.states, rows, strict=True):
                self.ids[name].append(int(row.argmax()))
                self.logits[name].append(row.clone())

    def end(self, *names: int) -> None:
        for name in names or [*self.states]:
            self.counted += self.backend.speculation(self.states[name])
            self.backend.free(self.states.pop(name))


def equal(one: Texts, other: Texts) -> None:
    assert one.ids == other.ids
    for name, logits in one.logits.items():
        for at, (mine, theirs) in enumerate(zip(logits, other.logits[name], strict=True)):
            assert torch.equal(mine, theirs), (name, at)


def joined_and_left(backend: Any) -> Texts:
    """Texts that begin and end at different times, some in the middle of a guess."""
    texts = Texts(backend)
    for name in range(4):
        texts.add(name, PROMPTS[name])
    texts.step(7)
    texts.add(4, PROMPTS[4])
    texts.step(2)
    texts.end(1)
    texts.add(10, PROMPTS[5], copies=3)
    texts.step(40)
    texts.end(0, 4, 11)
    texts.step(60)
    texts.end()
    return texts


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 0.95),  # the very same network
        ({"seed": 7, "num_hidden_layers": 1}, 0.05),
        ({"seed": 7, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}, 0.05),
    ],
)
def test_what_is_written_does_not_depend_on_the_draft(
    fields: dict[str, Any], rate: float, exact: bool, network: Made
) -> None:
    plain = joined_and_left(FlatBackend(network(), 1024, exact))
    backend, draft = FlatBackend(network(), 1024, exact), draft_of(network(**fields))
    assert backend.set_speculation(True, draft)
    found = joined_and_left(backend)
    equal(found, plain)
    assert plain.counted.draft_proposed == 0
    assert found.counted.draft_proposed > 100
    share = found.counted.draft_acceptance_rate
    assert share is not None and (share >= rate if not fields else share <= rate), share
    for each in (backend, draft.backend):
        assert not any(bank.spans for bank in each._banks._banks.values())
    assert not draft._sequences


def test_right_guesses_take_no_step(network: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FlatBackend(network(), 1024, exact=True)
    backend.set_speculation(False, draft_of(network()))
    steps: list[int] = []
    honest = backend.step_rows

    def counted(rows: Any, tokens: Any, adapters: Any) -> Any:
        steps.append(len(rows))
        return honest(rows, tokens, adapters)

    monkeypatch.setattr(backend, "step_rows", counted)
    texts = Texts(backend)
    texts.add(0, PROMPTS[3])
    texts.step(60)
    assert len(steps) <= 60 // 6 + 2  # one more where a bank ends
    assert max(steps) == 6


@pytest.mark.parametrize("kind", [LoRA(rank=4), Prompt(virtual_tokens=3), Prefix(virtual_tokens=5)])
def test_adapters_are_guessed_by_the_draft_of_their_base_or_by_their_own(
    kind: Any, network: Made
) -> None:
    def write(drafts: list[Any]) -> Texts:
        made = network()
        base = FlatBackend(made, 1024, exact=True)
        if drafts:
            base.set_speculation(True, drafts[0])
        adapted = [base.with_adapter(made.with_adapter(drawn(kind, n)), 512) for n in (1, 2)]
        if drafts:
            adapted[1].set_speculation(True, drafts[1])  # type: ignore[attr-defined]
        texts = Texts(base)
        for name, backend in enumerate([base, *adapted, adapted[0], base, adapted[1]]):
            texts.add(name, PROMPTS[name], backend=backend)
        texts.step(50)
        texts.end()
        return texts

    plain = write([])
    # The second adapter's own draft has the same weights, in place.
    drafts = [draft_of(network()), draft_of(network(drawn(kind, 2)))]
    found = write(drafts)
    equal(found, plain)
    alphas = [draft.length.acceptance for draft in drafts]
    assert alphas[1] > 0.9 > alphas[0], alphas


def test_an_adapter_that_is_closed_while_its_sequences_step(network: Made) -> None:
    """They go on as they would have, without its draft model, and so do those of the base."""

    def write(closes: bool) -> Texts:
        made = network()
        base = FlatBackend(made, 1024, exact=True)
        adapted = base.with_adapter(made.with_adapter(drawn(LoRA(rank=4), 1)), 512)
        texts = Texts(base)
        adapted.set_speculation(True, draft_of(network()))  # type: ignore[attr-defined]
        for name, backend in enumerate([base, adapted]):
            texts.add(name, PROMPTS[name], backend=backend)
        texts.step(9)
        if closes:
            adapted.close()
        texts.step(9)
        texts.end()
        return texts

    equal(write(closes=True), write(closes=False))


@pytest.mark.parametrize("vocabulary", [300, 352])
def test_a_vocabulary_that_is_filled_up_otherwise(
    vocabulary: int, network: Made, guesses: Callable[[int], None]
) -> None:
    """Ids that the draft has not are read as another token, those that the target has not, not told."""
    draft = network(vocab_size=vocabulary, seed=3)
    draft.model.lm_head.weight[-40:] *= 50  # it would write none but the last ones
    backend = FlatBackend(network(), 1024, exact=True)
    backend.set_speculation(True, draft_of(draft, target=network()))
    plain, found = (Texts(each) for each in (FlatBackend(network(), 1024, exact=True), backend))
    for texts in (plain, found):
        texts.add(0, np.array([319, 318, 5, 300, 310]))
        texts.add(1, PROMPTS[1])
        texts.step(40)
    equal(found, plain)


@pytest.mark.parametrize(("target", "draft"), [(128, 1024), (1024, 96), (100, 70)])
def test_contexts_that_end(target: int, draft: int, network: Made, tiny_gpt2: Made) -> None:
    """Of the target, behind which guesses may stand, and of the draft, which then guesses no more."""

    def gpt2(positions: int) -> Any:
        return as_network(
            tiny_gpt2(n_positions=positions, vocab_size=320).eval(), CPU, torch.float32
        )

    for make in (lambda size: network(max_position_embeddings=size), gpt2):
        backend = FlatBackend(make(target), target, exact=True)
        backend.set_speculation(True, draft_of(make(draft), context=draft))
        plain = Texts(FlatBackend(make(target), target, exact=True))
        found = Texts(backend)
        for texts in (plain, found):
            texts.add(0, PROMPTS[2])
            texts.add(1, PROMPTS[4])
            texts.step(min(target, 140) - len(PROMPTS[4]))
            texts.end()
        equal(found, plain)
        assert found.counted.draft_proposed > 0


def test_long_prompts_are_read_a_chunk_at_a_step_and_shared_beginnings_once(network: Made) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(3, 300, 2 * CHUNK + 50)
    other = np.concatenate([prompt[: CHUNK + 20], random.integers(3, 300, 30)])
    draft = draft_of(network())
    read: list[int] = []
    honest = draft.backend._prefill

    def counted(states: Any) -> Any:
        before = sum(state.unread for state in states)
        found = honest(states)
        read.append(before - sum(state.unread for state in states))
        return found

    draft.backend._prefill = counted  # type: ignore[method-assign]
    backend = FlatBackend(network(), 1024, exact=True)
    backend.set_speculation(False, draft)
    plain, found = Texts(FlatBackend(network(), 1024, exact=True)), Texts(backend)
    for texts in (plain, found):
        texts.add(0, prompt, copies=2)
        texts.add(5, other)
    for texts in (plain, found):
        texts.step(1)
    assert read == [CHUNK]
    for texts in (plain, found):
        texts.step(30)
    equal(found, plain)
    assert sum(read) <= len(prompt) + 2 + 35, "copies and other prompts go on behind what is known"
    found.end()
    assert found.counted.draft_accepted >= 0.9 * found.counted.draft_proposed > 20


def test_what_was_written_without_guesses_is_caught_up_with(
    network: Made, guesses: Callable[[int], None]
) -> None:
    backend = FlatBackend(network(), 1024, exact=True)
    backend.set_speculation(False, draft_of(network()))
    plain, found = Texts(FlatBackend(network(), 1024, exact=True)), Texts(backend)
    for texts in (plain, found):
        guesses(5)
        texts.add(0, PROMPTS[1])
        texts.add(1, PROMPTS[2])
        texts.step(20)
        guesses(0)
        texts.step(CHUNK + 20)
        guesses(5)
        before = texts.backend.speculation(texts.states[0])
        texts.step(20)
    equal(found, plain)
    later = backend.speculation(found.states[0]) - before
    assert later.draft_accepted > 10 and later.draft_accepted >= later.draft_proposed - 5


def test_where_rows_round_otherwise_there_is_no_draft(
    network: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FlatBackend._probe_logits
    draft = draft_of(network())
    plain = FlatBackend(network(), 1024)
    monkeypatch.setattr(
        FlatBackend, "_probe_logits", lambda self, ids: honest(self, ids) + 1e-3 * len(ids)
    )
    assert not plain.set_speculation(True, draft)
    server = FlatBackend(network(), 1024, exact=True)
    assert server.sizes in ((64,), (1,))  # no two numbers of rows round alike
    assert server.set_speculation(True, draft) == (server.rows > 1)
    monkeypatch.setattr(
        FlatBackend, "_probe_logits", lambda self, ids: honest(self, ids) + ids.sum()
    )
    alone = FlatBackend(network(), 1024, exact=True)
    assert alone.rows == 1 and not alone.set_speculation(True, draft)


def test_a_draft_is_a_part_of_what_sequences_take(network: Made) -> None:
    backend, draft = FlatBackend(network(), 1024), draft_of(network(num_hidden_layers=1))
    plain = backend.bytes_of(100)
    backend.set_speculation(True, draft)
    assert plain < backend.bytes_of(100) < 1.5 * plain
    short = draft_of(network(num_hidden_layers=1), context=64)
    backend.set_speculation(True, short)
    assert backend.bytes_of(1000) - FlatBackend(network(), 1024).bytes_of(1000) < plain


def test_a_draft_is_closed_with_what_it_guesses_for(network: Made) -> None:
    closed: list[str] = []

    def draft(name: str) -> DraftModel:
        backend = FlatBackend(network(), 1024)
        return DraftModel(name, backend, network(), lambda: closed.append(name))

    made = network()
    base = FlatBackend(made, 1024, exact=True)
    base.set_speculation(True, draft("base"))
    one, other = (base.with_adapter(made.with_adapter(drawn(LoRA(), n)), 512) for n in (1, 2))
    one.set_speculation(True, draft("adapter"))  # type: ignore[attr-defined]
    other.close()
    assert closed == []
    one.close()
    assert closed == ["adapter"]
    base.close()
    assert closed == ["adapter", "base"]
