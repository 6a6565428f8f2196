"""Running a network for many sequences at once, so that none can tell whether others run beside it.

A prompt is read alone, in chunks that depend on its own length. Then all sequences take their steps
together: their next tokens go through the layers as the rows of one matrix, and each looks at its own
keys and values. What a row gives must not depend on the others, to the last bit. A product's rows are
computed alike for most numbers of rows, but not for all of them: with one row, kernels of another kind
may be taken. So the network is probed once it is loaded: only numbers of rows that give the same bits
are used, and steps are filled up to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.models import heads
from luthier.models.layouts import Flat
from luthier.models.packing import packed, packed_weight
from luthier.models.prefix import prefix_cache, prefix_tokens
from luthier.serving.cache import (
    CHUNK_STEP,
    STEP,
    Bank,
    Banks,
    Chunk,
    Span,
    Step,
    in_order,
    room_for,
)

if TYPE_CHECKING:
    from luthier.models.network import Network
    from luthier.types import IntArray

SIZES = (4, 8, 16, 32, 64)
"""Numbers of rows that may run in one step. Products of one or two rows are made by other kernels."""
SMALL = 4096
"""Batched products of no more multiplications are made by another kernel, where numbers have 16 bits;
one sequence alone must not fall below it."""
CHUNK = 256
"""Tokens of a prompt that are read at once; between two chunks the others take a step."""
PROBES = 16
"""Rows that are compared when a network is probed."""


class State(Protocol):
    """What a network keeps of one sequence."""

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        ...


class Stepper(Protocol):
    """Runs one network; used by one thread at a time."""

    context: int
    """Tokens of prompt and answer together at most."""
    network: Network
    """What it runs."""

    @property
    def rows(self) -> int:
        """Sequences that step together at most; further ones step after them."""
        ...

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        ...

    def begin(self, ids_T: IntArray) -> State:
        """A sequence with nothing read of its prompt yet."""
        ...

    def read(self, state: State) -> Tensor | None:
        """Read the next chunk; with the last one, logits ``[V]`` of the first token to write."""
        ...

    def fork(self, state: State, copies: int) -> list[State]:
        """``copies`` sequences that go on from a prompt that was read; ``state`` is used up."""
        ...

    def step(self, states: Sequence[State], tokens: Sequence[int]) -> Tensor:
        """Append a token to each sequence; logits ``[R, V]`` of the next ones."""
        ...

    def drop(self, state: State) -> None:
        """Give the memory of a sequence back."""
        ...

    def close(self) -> None:
        """Let go of the network."""
        ...


def stepper_of(network: Network, context: int) -> Stepper:
    """The way to run ``network``, whose rows are of ``context`` tokens at most."""
    network.model.eval()
    if isinstance(network.layout, Flat):
        return Together(network, context)
    return Alone(network, context)


class _Written:
    """A sequence of :class:`Together`."""

    def __init__(self, ids_T: IntArray, span: Span) -> None:
        self.ids_T, self.span, self.read = ids_T, span, 0

    @property
    def unread(self) -> int:
        return len(self.ids_T) - self.read


class Together:
    """Networks on the flat layout: all sequences step together."""

    def __init__(self, network: Network, context: int) -> None:
        window = getattr(network.model.config, "sliding_window", None)
        # Attention here sees everything; where a network would forget, a sequence ends.
        self.context = min(context, window) if isinstance(window, int) and window else context
        self.network, self._layout = network, network.layout
        assert isinstance(self._layout, Flat)
        self._first = self._layout.first_position
        self._before = prefix_tokens(network.model)
        self._open = ExitStack()
        self._open.enter_context(packed(network.model))
        self._banks = Banks()
        config = network.model.config
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = torch.empty(0, dtype=network.dtype).element_size()
        self._bytes = 2 * int(config.num_hidden_layers) * int(key_heads) * int(size) * width
        large = int(config.num_attention_heads) * int(size) * STEP > SMALL
        self.sizes = self._probe() if large or network.dtype == torch.float32 else (1,)
        self.rows = self.sizes[-1]

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        return room_for(tokens + self._before + CHUNK_STEP) * self._bytes

    def begin(self, ids_T: IntArray) -> State:
        """A sequence in a bank of its own until its prompt is read."""
        whole = -(-len(ids_T) // CHUNK_STEP) * CHUNK_STEP
        return _Written(ids_T, Bank(room_for(whole + self._before)).add())

    @torch.inference_mode()
    def read(self, state: Any) -> Tensor | None:
        """Read the next chunk of the prompt."""
        ids_N = state.ids_T[state.read : state.read + CHUNK]
        size = -(-len(ids_N) // CHUNK_STEP) * CHUNK_STEP
        device = self.network.device
        chunk = Chunk(state.span, size, self._before, device)
        padded_N = np.zeros(size, dtype=np.int64)
        padded_N[: len(ids_N)] = ids_N
        start = self._first + chunk.start + chunk.before
        hidden_NH = self._run(torch.from_numpy(padded_N), torch.arange(start, start + size), chunk)
        state.read += len(ids_N)
        state.span.length += chunk.before + len(ids_N)
        if state.unread:
            return None
        return self._logits(hidden_NH[len(ids_N) - 1 :][:1])[0]

    @torch.inference_mode()
    def fork(self, state: Any, copies: int) -> list[State]:
        """Copies in the banks of those who step together."""
        span: Span = state.span
        made = [self._banks.keep(span, span.length + 1) for _ in range(copies)]
        span.bank.remove(span)
        none = np.zeros(0, dtype=np.int64)
        return [_Written(none, span) for span in made]

    @torch.inference_mode()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One token for each, in as few steps as the numbers of rows allow."""
        for state in states:
            state.span = self._banks.grown(state.span)
        order = in_order([state.span for state in states])
        most = self.rows
        parts = [
            self._step([states[i].span for i in rows], [tokens[i] for i in rows])
            for rows in (order[first : first + most] for first in range(0, len(order), most))
        ]
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return torch.cat(parts)[torch.from_numpy(back).to(parts[0].device)]

    def drop(self, state: Any) -> None:
        """Give its place in the bank back."""
        with torch.inference_mode():
            state.span.bank.remove(state.span)

    def close(self) -> None:
        """Let go of the network and of all keys and values."""
        self._open.close()
        self._banks = Banks()
        self.network.close()

    def _step(self, spans: Sequence[Span], tokens: Sequence[int]) -> Tensor:
        size = next(size for size in self.sizes if size >= len(spans))
        fill = [0] * (size - len(spans))
        positions = [self._first + span.length for span in spans]
        step = Step(spans, self.network.device)
        hidden_NH = self._run(
            torch.tensor([*tokens, *fill]), torch.tensor([*positions, *fill]), step
        )
        for span in spans:
            span.length += 1
        return self._logits(hidden_NH)[: len(spans)]

    def _run(self, ids_N: Tensor, position_N: Tensor, attention: Any) -> Tensor:
        device = self.network.device
        output = self.network.model.base_model(
            input_ids=ids_N[None].to(device),
            position_ids=position_N[None].to(device),
            tree=attention,
            use_cache=False,
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        head = packed_weight(self.network.model.get_output_embeddings())
        if head is None:
            return self.network.logits(hidden_NH)
        return head.product(self.network.before_vocabulary(hidden_NH))

    @torch.inference_mode()
    def _probe(self) -> tuple[int, ...]:
        """The numbers of rows that give each row the same bits, whatever is beside it.

        Where none does, each sequence steps by itself.
        """
        size = int(self.network.model.config.vocab_size)
        ids = np.random.default_rng(0).integers(size // 2, size, SIZES[-1])
        whole = self._probed(ids)
        moved = self._probed(np.roll(ids, PROBES) + np.where(np.arange(len(ids)) < PROBES, -1, 0))
        if not torch.equal(moved[PROBES : 2 * PROBES], whole[:PROBES]):
            return (1,)
        sizes = [SIZES[-1]]
        # From the largest down: a small one that agrees by luck below one that does not is left out.
        for count in reversed(SIZES[:-1]):
            parts = [self._probed(ids[at : at + count]) for at in range(0, PROBES, count)]
            if not torch.equal(torch.cat(parts)[:PROBES], whole[:PROBES]):
                break
            sizes.insert(0, count)
        return tuple(sizes)

    def _probed(self, ids: IntArray) -> Tensor:
        """Logits behind sequences of the same token twice."""
        banks = Banks()
        spans = [banks.keep(Bank(room_for(1)).add(), 1) for _ in ids]
        ids_N = torch.from_numpy(ids.astype(np.int64))
        for place in range(2):
            attention = Step(spans, self.network.device)
            hidden_NH = self._run(ids_N, torch.full_like(ids_N, self._first + place), attention)
            for span in spans:
                span.length += 1
        return self._logits(hidden_NH)


class _Single:
    """A sequence of :class:`Alone`."""

    def __init__(self, ids_T: IntArray, cache: Any) -> None:
        self.ids_T, self.cache, self.done = ids_T, cache, False
        self.further: dict[str, Any] = {}

    @property
    def unread(self) -> int:
        return 0 if self.done else len(self.ids_T)


class Alone:
    """Networks that need their own forward and cache: each sequence steps by itself."""

    rows = 1

    def __init__(self, network: Network, context: int) -> None:
        self.network, self.context = network, context
        model = network.model
        self._beside = heads.decoder_of(model) is not None
        config = model.config
        layers = int(getattr(config, "num_hidden_layers", 1))
        width = torch.empty(0, dtype=network.dtype).element_size()
        self._bytes = 2 * layers * int(config.hidden_size) * width * (2 if self._beside else 1)

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes, by the size of the network's states."""
        return tokens * self._bytes

    def begin(self, ids_T: IntArray) -> State:
        """A sequence with nothing read."""
        return _Single(ids_T, None)

    @torch.inference_mode()
    def read(self, state: Any) -> Tensor | None:
        """Read the whole prompt."""
        model, device = self.network.model, self.network.device
        ids = torch.from_numpy(state.ids_T)[None].to(device)
        state.cache = prefix_cache(model, rows=1)
        if self._beside:
            state.further["encoder_outputs"] = model.get_encoder()(input_ids=ids)
            ids = torch.tensor([[heads.decoder_start(model)]], device=device)
        state.done = True
        return self._forward(state, ids)

    def fork(self, state: Any, copies: int) -> list[State]:
        """The prompt is read again for each further copy: these caches cannot be copied."""
        made: list[State] = [state]
        for _ in range(copies - 1):
            again = self.begin(state.ids_T)
            self.read(again)
            made.append(again)
        return made

    @torch.inference_mode()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One after the other."""
        device = self.network.device
        return torch.stack(
            [
                self._forward(state, torch.tensor([[token]], device=device))
                for state, token in zip(states, tokens, strict=True)
            ]
        )

    def drop(self, state: Any) -> None:
        """Forget its cache."""
        state.cache, state.further = None, {}

    def close(self) -> None:
        """Let go of the network."""
        self.network.close()

    def _forward(self, state: _Single, ids: Tensor) -> Tensor:
        name = "decoder_input_ids" if self._beside else "input_ids"
        out = self.network.model(
            **{name: ids}, past_key_values=state.cache, use_cache=True, **state.further
        )
        state.cache = out.past_key_values
        logits_V: Tensor = out.logits[0, -1]
        return logits_V
