"""Adapters share a base and step together: each row has the bits that it has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from luthier.adaptations import Adapters, BitFit, LoRA, Prefix, Prompt
from luthier.errors import RecipeError
from luthier.models import row_adapters
from luthier.models.backends import Backend, backend_of
from luthier.models.decoding import Decoding
from luthier.models.heads import prompt_ids
from luthier.models.load import as_network, load_model
from luthier.models.sampling import Sampling
from luthier.models.torch_backend import FlatBackend

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 5 + size) % 250 + 3 for size in (1, 7, 31, 33, 64)]
KINDS: list[Any] = [
    LoRA(rank=4),
    LoRA(rank=1, rslora=True),
    LoRA(rank=4, targets=("down_proj",), alpha=7.0),
    LoRA(rank=4, dora=True),
    Adapters(reduction_factor=4),
    Prompt(virtual_tokens=3),
    Prefix(virtual_tokens=5),
    BitFit(),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def base_network(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return as_network(load_model(folder, dtype, CPU).eval(), CPU, dtype)


@pytest.fixture
def folder_of(
    family_folder: Callable[[str], Path], tiny_llama: Callable[..., Any], tmp_path: Path
) -> Callable[[str], Path]:
    """``family_folder``, which has no Llama with biases (``biased``)."""

    def folder(family: str) -> Path:
        if family != "biased":
            return family_folder(family)
        if not (tmp_path / family).exists():
            model = tiny_llama(attention_bias=True, mlp_bias=True)
            for name, weight in model.named_parameters():
                if name.endswith(".bias"):
                    torch.nn.init.normal_(weight, std=0.3)
            model.save_pretrained(tmp_path / family)
        return tmp_path / family

    return folder


def drawn(adaptation: Any, seed: int, shared: bool = True) -> Callable[[Any], None]:
    """Attaches ``adaptation`` with weights far from where it starts."""

    def attach(model: Any) -> None:
        torch.manual_seed(seed)
        adaptation.attach(model, shared)
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)

    return attach


def write(backends: list[Backend], prompts: list[Any], count: int) -> list[list[torch.Tensor]]:
    """The logits behind each prompt by the backend beside it, all of them stepping together."""
    states, last, found = [], [], []
    for backend, prompt in zip(backends, prompts, strict=True):
        soft = np.array(prompt_ids(backend.network.model), dtype=np.int64)
        state, logits = backend.open(np.concatenate([soft, prompt])), None
        while logits is None:
            logits = backend.prefill([state])[0]
        states += backend.fork(state, 1)
        last.append(int(logits.argmax()))
        found.append([logits.clone()])
    for _ in range(count):
        logits_RV = backends[0].step(states, last)
        last = logits_RV.argmax(-1).tolist()
        for own, row in zip(found, logits_RV, strict=True):
            own.append(row.clone())
    for state in states:
        backends[0].free(state)
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama", "biased", "gpt2"])
def test_each_row_has_the_bits_that_it_has_alone(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    """Adapters of all kinds, several of some, more than one row of some, and the bare base."""
    network = base_network(folder_of(family))
    base = FlatBackend(network, 512, exact=True)
    assert (base._llama is None) == (family == "gpt2")
    unable = {"llama": "bitfit", "gpt2": "adapters"}.get(family)
    kinds = [kind for kind in KINDS if kind.method != unable]
    if family == "gpt2":
        kinds[2] = LoRA(rank=4, targets=("c_proj",), alpha=7.0)
    backends: list[Backend] = [base]
    for seed, kind in enumerate([*kinds, *kinds[:2], kinds[-1]]):
        backends.append(base.with_adapter(network.with_adapter(drawn(kind, seed)), 512))
    rows = [*backends, backends[1], backends[1], backends[0], backends[4]]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(rows))]
    together = write(rows, prompts, 6)
    for backend, prompt, own in zip(rows, prompts, together, strict=True):
        assert equal(write([backend], [prompt], 6)[0], own), backend
    # Nothing of the adapters has gone into the base ...
    bare = write([FlatBackend(base_network(folder_of(family)), 512, exact=True)], PROMPTS[:1], 6)
    assert equal(bare[0], together[0])
    # ... each answers as its own weights say, and lets go of its place.
    first = [own[0] for own, prompt in zip(together, prompts, strict=True) if prompt is PROMPTS[0]]
    assert all(not torch.equal(first[0], other) for other in first[1:2])
    for adapted in backends[1:]:
        adapted.close()
    assert not base._shared._stacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_keeps_its_bits_beside_adapters_where_only_its_first_biases_are_zero(
    dtype: torch.dtype, tiny_gpt2: Callable[..., Any]
) -> None:
    """What the first layer of a shape shows does not hold for one that has biases."""
    model = tiny_gpt2(n_embd=64, n_layer=2)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("bias") and ".h.0." not in name:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    network = as_network(model.to(dtype).eval(), CPU, dtype)
    base = FlatBackend(network, 512, exact=True)
    alone = write([base], PROMPTS[1:2], 6)[0]
    backends = [
        base.with_adapter(network.with_adapter(drawn(kind, 1)), 512)
        for kind in (LoRA(rank=4), BitFit())
    ]
    together = write([base, *backends], PROMPTS[1:2] * 3, 6)
    assert equal(together[0], alone)
    assert not any(equal(other, alone) for other in together[1:])


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llama", kind) for kind in KINDS[:-1]), ("biased", KINDS[-1]), ("gpt2", KINDS[-1])],
    ids=lambda value: getattr(value, "method", value),
)
def test_what_is_written_beside_the_base_is_what_the_adapted_network_says(
    family: str, kind: Any, folder_of: Callable[[str], Path]
) -> None:
    """The network with the adapter in place, as it is trained, and whose weights nothing rounds."""
    network = base_network(folder_of(family))
    adapted = network.with_adapter(drawn(kind, 1))
    alone = base_network(folder_of(family))
    drawn(kind, 1, shared=False)(alone.model)
    expected = write([FlatBackend(alone, 512)], PROMPTS[1:2], 8)[0]
    backend = FlatBackend(network, 512, exact=True).with_adapter(adapted, 512)
    for one, other in zip(write([backend], PROMPTS[1:2], 8)[0], expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def with_two(network: Any, rank: int) -> tuple[FlatBackend, Any, Any]:
    """A backend of ``network``, and those of two LoRA on it."""
    base = FlatBackend(network, 512, exact=True)
    one, other = (
        base.with_adapter(network.with_adapter(drawn(LoRA(rank=rank), s)), 512) for s in (1, 2)
    )
    return base, one, other


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_answers_of_one_adapter_have_the_same_bits_however_many(
    rows: int, family_folder: Callable[[str], Path]
) -> None:
    _, one, other = with_two(base_network(family_folder("llama")), rank=4)
    alone = write([one], PROMPTS[1:2], 4)[0]
    together = write([*[one] * rows, other], [*[PROMPTS[1]] * rows, PROMPTS[2]], 4)
    assert all(equal(own, alone) for own in together[:rows])


def test_where_sizes_of_matrices_give_other_bits_prompts_are_read_apart(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_sizes_agree", "_divides", "_adds_inside"):
        monkeypatch.setattr(row_adapters, name, lambda *given: False)
    network = base_network(family_folder("llama"))
    base = FlatBackend(network, 512, exact=True)
    backends = [
        base.with_adapter(network.with_adapter(drawn(LoRA(rank=4), s)), 512) for s in (1, 2)
    ]
    assert not any(base._shared.mixes_prompts(each._adapter) for each in backends)  # type: ignore[attr-defined]
    assert [each.reusable(300) for each in backends] == [256, 256]  # type: ignore[attr-defined]
    rows: list[Backend] = [base, *backends, backends[0]]
    together = write(rows, PROMPTS[:4], 4)
    for backend, prompt, own in zip(rows, PROMPTS[:4], together, strict=True):
        assert equal(write([backend], [prompt], 4)[0], own)


def test_shapes_are_tried_once_though_their_adapters_go(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[row_adapters.Adapter] = []

    def trial(adapter: row_adapters.Adapter) -> bool:
        tried.append(adapter)
        return True

    monkeypatch.setattr(row_adapters, "_sizes_agree", trial)
    monkeypatch.setattr(row_adapters, "KNOWN_SHAPES", 2)
    network = base_network(family_folder("llama"))
    shared = row_adapters.SharedBase(network, (4, 8))

    def come_and_go(rank: int) -> None:
        adapter = shared.adapter_of(network.with_adapter(drawn(LoRA(rank=rank), 0)))
        shared.add(adapter)
        shared.remove(adapter)
        assert not shared._stacks

    for rank in (2, 2, 4, 2, 4):
        come_and_go(rank)
    assert len(tried) == 2
    come_and_go(8)  # in the place of 2, which is tried anew
    come_and_go(2)
    assert len(tried) == 4 and len(shared._bits) == 2


@pytest.mark.slow
def test_in_bfloat16_too(tiny_llama: Callable[..., Any]) -> None:
    network = as_network(tiny_llama(hidden_size=256).bfloat16().eval(), CPU, torch.bfloat16)
    base = FlatBackend(network, 512, exact=True)
    backends = [
        base.with_adapter(network.with_adapter(drawn(LoRA(rank=8), s)), 512) for s in range(4)
    ]
    rows: list[Backend] = [base, *backends, backends[0]]
    prompts = [PROMPTS[1]] * len(rows)
    together = write(rows, prompts, 4)
    for backend, own in zip(rows, together, strict=True):
        assert equal(write([backend], PROMPTS[1:2], 4)[0], own)
    assert not equal(together[1], together[2])
    # Rows of one adapter alone, and beside those of another.
    for count in (1, 3, 30):
        many = write([*[backends[0]] * count, backends[1]], prompts[:1] * (count + 1), 4)
        same = write([backends[0]] * count, prompts[:1] * count, 4)
        assert all(equal(own, together[1]) for own in [*many[:-1], *same])
        assert equal(many[-1], together[2])


def read_together(backends: list[Backend], prompts: list[Any]) -> list[torch.Tensor]:
    """The logits behind each prompt by the backend beside it, all read together."""
    states = [backend.open(prompt) for backend, prompt in zip(backends, prompts, strict=True)]
    found: dict[int, torch.Tensor] = {}
    while len(found) < len(states):
        left = [at for at in range(len(states)) if at not in found]
        for at, row in zip(left, backends[0].prefill([states[at] for at in left]), strict=True):
            if row is not None:
                found[at] = row.clone()
    for state in states:
        backends[0].free(state)
    return [found[at] for at in range(len(states))]


@pytest.mark.parametrize(
    "kinds",
    [
        [LoRA(rank=8)] * 2,
        [LoRA(rank=8, alpha=7.0), LoRA(rank=4, dora=True)],
        [Adapters()] * 2,
        [BitFit(), LoRA(rank=8)],
    ],
    ids=["lora", "two shapes", "adapters", "biases"],
)
def test_prompts_of_several_adapters_have_the_bits_of_each_alone(
    kinds: list[Any], tiny_llama: Callable[..., Any]
) -> None:
    """Beside those of the base, and in parts beside others than before."""
    model = tiny_llama(hidden_size=256, attention_bias=True)
    network = as_network(model.bfloat16().eval(), CPU, torch.bfloat16)
    base = FlatBackend(network, 512, exact=True)
    one, other = (
        base.with_adapter(network.with_adapter(drawn(each, s)), 512) for s, each in enumerate(kinds)
    )
    backends: list[Backend] = [one, base, other, one, other, one, base]
    sizes = (31, 7, 40, 300, 90, 17, 290)
    prompts = [np.arange(5, 5 + size) % 250 + 3 for size in sizes]
    alone = [
        read_together([each], [prompt])[0] for each, prompt in zip(backends, prompts, strict=True)
    ]
    assert equal(read_together(backends, prompts), alone)
    assert equal(read_together(backends[::-1], prompts[::-1]), alone[::-1])
    assert not torch.equal(*(read_together([each], prompts[:1])[0] for each in (one, other)))


@pytest.fixture
def mixing(family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> FlatBackend:
    """A backend whose trials say that rows of all adapters run together."""
    for name in ("_sizes_agree", "_adds_to_prompts"):
        monkeypatch.setattr(row_adapters, name, lambda *given: True)
    return FlatBackend(base_network(family_folder("llama")), 512)


def test_prompts_of_several_adapters_are_read_in_one_pass(
    mixing: FlatBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it changes no bits; never with what stands before a prompt in its own network alone."""
    base, network = mixing, mixing.network
    kinds = [LoRA(rank=4), LoRA(rank=4), Prefix(virtual_tokens=5), Prompt(virtual_tokens=3)]
    one, other, prefix, prompt = (
        base.with_adapter(network.with_adapter(drawn(each, s)), 512) for s, each in enumerate(kinds)
    )
    passes: list[int] = []
    run = base._run

    def counted(model: Any, ids_N: torch.Tensor, *further: Any) -> torch.Tensor:
        passes.append(len(ids_N))
        return run(model, ids_N, *further)

    monkeypatch.setattr(base, "_run", counted)
    prompts = [np.arange(5, 5 + size) % 250 + 3 for size in (31, 7, 40, 90, 17)]
    found = read_together([one, base, other, other, one], prompts)
    assert passes == [208]
    for backend, row, ids in zip([one, base, other, other, one], found, prompts, strict=True):
        assert torch.allclose(read_together([backend], [ids])[0], row, atol=1e-4)
    passes.clear()
    soft = np.concatenate([prompt_ids(prompt.network.model), prompts[0]])
    read_together([one, prefix, prompt], [prompts[0], prompts[0], soft])
    assert len(passes) == 3
    monkeypatch.setattr(row_adapters, "_adds_to_prompts", lambda *given: False)
    apart = FlatBackend(network, 512)
    backends = [
        apart.with_adapter(network.with_adapter(drawn(LoRA(rank=2), s)), 512) for s in range(2)
    ]
    monkeypatch.setattr(apart, "_run", counted)
    passes.clear()
    read_together([*backends], prompts[:2])
    assert len(passes) == 2


def test_an_adapter_is_taken_in_between_two_passes(
    mixing: FlatBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, which tries meanwhile how its rows may be computed."""
    base, network = mixing, mixing.network
    adapter = base.with_adapter(network.with_adapter(drawn(LoRA(rank=4), 0)), 512)
    later = network.with_adapter(drawn(LoRA(rank=2), 1))
    expected = read_together([adapter], PROMPTS[1:2])[0]
    tried, added, run = threading.Event(), threading.Event(), base._run
    monkeypatch.setattr(row_adapters, "_divides", lambda *given: tried.set() or True)
    monkeypatch.setattr(row_adapters, "_adds_to_prompts", lambda *given: False)

    def take_in() -> None:
        base.with_adapter(later, 512)
        added.set()

    thread = threading.Thread(target=take_in)

    def meanwhile(*given: Any) -> torch.Tensor:
        thread.start()
        assert tried.wait(60)
        assert not added.wait(0.2)
        return run(*given)

    monkeypatch.setattr(base, "_run", meanwhile)
    assert torch.equal(read_together([adapter], PROMPTS[1:2])[0], expected)
    thread.join(60)
    assert added.is_set()


def test_an_adapter_that_comes_again_copies_nothing(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights stay stacked while it is in memory, and no longer than its sequences after that."""
    network = base_network(family_folder("llama"))
    shared = row_adapters.SharedBase(network, (4, 8))
    adapters = [shared.adapter_of(network.with_adapter(drawn(LoRA(rank=2), s))) for s in range(9)]
    added: list[row_adapters.Adapter] = []
    resized: list[int] = []
    add, resize = row_adapters.AdapterStack.add, row_adapters.AdapterStack._resize

    def counted_add(stack: Any, adapter: Any) -> None:
        added.append(adapter)
        add(stack, adapter)

    def counted(stack: Any, capacity: int) -> None:
        resized.append(capacity)
        resize(stack, capacity)

    monkeypatch.setattr(row_adapters.AdapterStack, "add", counted_add)
    monkeypatch.setattr(row_adapters.AdapterStack, "_resize", counted)
    for adapter in adapters:
        shared.add(adapter)
    for adapter in [*adapters[:8], *adapters[:8]]:
        shared.enter(adapter)
        shared.leave(adapter)
    assert added == adapters[:8] and resized == [1, 2, 4, 8]
    for old, new in ((7, 8), (6, 7), (5, 6)):  # one goes, and another comes in its place
        shared.remove(adapters[old])
        shared.add(adapters[old])
        shared.enter(adapters[new])
        shared.leave(adapters[new])
        shared.remove(adapters[new])
        shared.add(adapters[new])
    assert resized == [1, 2, 4, 8]
    (stack,) = shared._stacks.values()
    shared.enter(adapters[3])
    for adapter in adapters:
        shared.remove(adapter)
    assert stack.adapters == [adapters[3]] and len(next(iter(stack.weights.values()))[0]) <= 2
    shared.leave(adapters[3])
    assert not shared._stacks and {each.slot for each in adapters} == {-1}


@pytest.mark.parametrize("call", [0, 9, 20])
@pytest.mark.parametrize("fails", ["new_empty", "copy_"])
def test_an_adapter_that_finds_no_memory_leaves_all_others_as_they_were(
    call: int, fails: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has its own weights when it comes again."""
    network = base_network(family_folder("llama"))
    *_, other = with_two(network, rank=2)
    alone = write([other], PROMPTS[1:2], 3)[0]
    base, one, other = with_two(network, rank=2)
    first = write([one], PROMPTS[1:2], 3)[0]
    real, calls = getattr(torch.Tensor, fails), iter(range(1000))

    def failing(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise MemoryError
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, fails, failing)
        with pytest.raises(MemoryError):
            base._shared.enter(other._adapter)  # type: ignore[attr-defined]
    assert equal(write([one], PROMPTS[1:2], 3)[0], first)
    assert equal(write([other], PROMPTS[1:2], 3)[0], alone)
    assert equal(write([one], PROMPTS[1:2], 3)[0], first)


def test_a_sequence_may_end_after_its_adapter_and_its_base(
    family_folder: Callable[[str], Path],
) -> None:
    network = base_network(family_folder("llama"))
    base = FlatBackend(network, 512, exact=True)
    adapter = base.with_adapter(network.with_adapter(drawn(LoRA(rank=2), 1)), 512)
    state = adapter.open(PROMPTS[1])
    adapter.close()
    base.close()
    base.free(state)


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_is_multiplied_by_its_own_matrix(
    parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in parts, as accelerators sum; with rows behind that nobody reads."""
    monkeypatch.setattr(row_adapters, "_sum_parts", lambda *given: parts)
    generator = torch.Generator().manual_seed(0)
    stack_PIO = torch.randn(5, 64, 24, generator=generator).to(dtype)
    x_RI = torch.randn(9, 64, generator=generator).to(dtype)
    slots = [3, 0, 3, 4, 1, 3]

    def product(rows: list[int], size: int) -> torch.Tensor:
        own = row_adapters.Slots([slots[row] for row in rows], size, CPU)
        x = torch.cat([x_RI[rows], x_RI[len(rows) : size]])
        return row_adapters.RowWeight(stack_PIO, own).product(x)

    together = product([*range(6)], 9)
    assert together.shape == (9, 24) and together.dtype == dtype
    expected = torch.einsum("ri,rio->ro", x_RI[:6].double(), stack_PIO[slots].double())
    rounding = 16 * torch.finfo(dtype).eps * (1 if parts == 1 else 4)
    assert torch.allclose(together[:6].double(), expected, atol=rounding, rtol=rounding)
    assert all(torch.equal(product([row], 4)[0], together[row]) for row in range(6))
    backwards = product([5, 4, 3, 2, 1, 0], 6)
    assert torch.equal(backwards.flip(0), together[:6])


def test_the_same_adapters_in_passes_of_other_sizes(tiny_llama: Callable[..., Any]) -> None:
    """What one pass looked up is not taken for another that is filled up otherwise."""
    network = as_network(tiny_llama().eval(), CPU, torch.float32)
    shared = row_adapters.SharedBase(network, (4, 8, 64))
    adapters = [shared.adapter_of(network.with_adapter(drawn(LoRA(rank=4), s))) for s in range(2)]
    for adapter in adapters:
        shared.add(adapter)
        shared.enter(adapter)
    name = next(iter(adapters[0].layers))
    width = adapters[0].layers[name].base_layer.weight.shape[1]
    rows = [*adapters[:1] * 3, *adapters[1:] * 2]
    x_RI = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    updates = []
    for size in (8, 64, 64, 8):
        mixed = shared.model_of_step(rows, size)
        update_RO = mixed.get_submodule(name)._sum_at((name, False), x_RI[:size])
        assert update_RO is not None and len(update_RO) == size
        updates.append(update_RO[: len(rows)])
    assert all(torch.equal(each, updates[0]) for each in updates)


def test_the_backend_of_an_adapted_network_gives_the_same_texts(
    family_folder: Callable[[str], Path],
) -> None:
    """As the command line opens it: nobody else asks the base, and many prompts are read at once."""
    network = base_network(family_folder("llama"))
    adapted = network.with_adapter(drawn(LoRA(rank=4), 1))
    served = FlatBackend(network, 512, exact=True).with_adapter(adapted, 512)
    expected = write([served], PROMPTS[1:2], 6)[0]
    backend = backend_of(adapted, 512)
    for together in (False, True):
        decoding = Decoding(backend, PROMPTS[1:3], 2, Sampling(), [0, 0], 7, (), together=together)
        while decoding.step():
            pass
        assert decoding.rows[0].ids == [int(row.argmax()) for row in expected]
        decoding.close()
    backend.close()


def test_an_adapter_of_another_base_is_refused(family_folder: Callable[[str], Path]) -> None:
    one, other = (base_network(family_folder("llama")) for _ in range(2))
    backend = FlatBackend(one, 512, exact=True)
    with pytest.raises(RecipeError, match="not a layer of the base"):
        backend.with_adapter(other.with_adapter(drawn(LoRA(rank=4), 1)), 512)


def test_adapters_come_and_go_while_others_are_written(
    family_folder: Callable[[str], Path],
) -> None:
    network = base_network(family_folder("llama"))
    base = FlatBackend(network, 512, exact=True)

    def backend(seed: int) -> Backend:
        return base.with_adapter(network.with_adapter(drawn(LoRA(rank=4), seed)), 512)

    def begin(backend: Backend) -> Any:
        state = backend.open(PROMPTS[1])
        backend.prefill([state])
        return backend.fork(state, 1)[0]

    first = backend(0)
    alone = write([first], PROMPTS[1:2], 12)[0]
    state, last, found = begin(first), int(alone[0].argmax()), []
    others: list[Any] = []
    for at in range(12):
        if at % 2:
            others.append(begin(backend(at)))
        elif others:
            base.free(others.pop(0))
        logits = base.step([*others, state], [*[7] * len(others), last])[-1]
        found.append(logits.clone())
        last = int(logits.argmax())
    assert equal(found, alone[1:])
    (stack,) = base._shared._stacks.values()
    assert len(stack.adapters) == 7  # those that wrote


def tensor_bytes(*owners: Any) -> dict[int, int]:
    """Bytes of the memory that tensors of networks and stacks have, by its address."""
    found: dict[int, int] = {}
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            tensors = [*owner.parameters(), *owner.buffers()]
        else:
            tensors = [each for weights in owner.weights.values() for each in weights]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[-1]], ids=lambda kind: kind.method)
def test_an_adapter_takes_twice_its_file_at_most_however_many_write(
    kind: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    network = base_network(folder_of("biased"))
    base = FlatBackend(network, 512, exact=True)
    backends = [base.with_adapter(network.with_adapter(drawn(kind, n)), 512) for n in range(29)]
    frozen = tensor_bytes(network.model)
    own = {
        name: weight.contiguous()
        for name, weight in backends[0].network.model.named_parameters()
        if weight.untyped_storage().data_ptr() not in frozen
    }
    save_file(own, tmp_path / "adapter")
    size = (tmp_path / "adapter").stat().st_size

    def excess(loaded: list[Any]) -> int:
        """Bytes beyond twice the files of the adapters that are in memory, and the spare places."""
        all_stacks = [*base._shared._stacks.values()]
        found = tensor_bytes(*(each.network.model for each in loaded), *all_stacks)
        allowed = 2 * size * len(loaded) + size * max(1, len(loaded) // 8)
        return sum(found[each] for each in found.keys() - frozen.keys()) - allowed

    states: list[Any] = []
    for backend in backends:
        states += backend.fork(read(backend), 1)
        assert excess(backends) <= 0
    while states:
        base.free(states.pop(len(states) // 2))
        assert excess(backends) <= 0
    for backend in backends[:20]:
        states += backend.fork(read(backend), 1)
    for state in states[::2]:
        base.free(state)
    for count, backend in enumerate(backends[:20:2], 1):
        backend.close()
        assert excess([*backends[1:20:2], *backends[2 * count : 20 : 2], *backends[20:]]) <= 0
    for state in states[1::2]:
        base.free(state)


def read(backend: Any) -> Any:
    """Its state once a prompt is read."""
    state = backend.open(PROMPTS[1])
    while backend.prefill([state])[0] is None:
        pass
    return state
