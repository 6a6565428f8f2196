"""Which backend writes a model fastest on this machine, for how many streams: measured, and said.

Torch is as it serves: its weights are packed, each sequence has the bits that it has alone, and an
adapter stands beside its base, or is merged where the environment says so. llama.cpp runs the GGUF file
that it would serve, adapters merged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import RecipeError, RefusedInput
from luthier.models.backends import ADAPTERS_SETTING, BACKENDS, SETTING
from luthier.serving.derived_gguf import TYPE_SETTING, gguf_of, parity_of

if TYPE_CHECKING:
    from luthier.models.backends import Backend
    from luthier.models.gguf import Quantization
    from luthier.store.models import StoredModel
    from luthier.types import IntArray

PROMPT_TOKENS, STEPS, TURNS = 24, 8, 3
"""Read once, written in each turn, and turns of each backend, of which the fastest counts."""
CLEARLY = 1.1
"""Times as fast another backend has to be than torch, whose answers are those of training."""


@dataclass(frozen=True)
class BackendSpeed:
    """How fast a backend writes a model."""

    backend: str
    """As ``LUTHIER_BACKEND`` has it."""
    weights: str
    """Their type, as ``LUTHIER_GGUF_TYPE`` has it; torch's own."""
    tokens_per_second: dict[int, float]
    """Of all streams together, by their number."""
    nats: float | None = None
    """How far its next tokens are from torch's in the mean."""
    merged: bool = False
    """Whether it is torch with the adapter merged, which otherwise stands beside its base."""

    @property
    def setting(self) -> str:
        """The environment that chooses it; empty for torch as it answers without."""
        if self.backend == "torch":
            return f"{ADAPTERS_SETTING}=merged" if self.merged else ""
        return f"{SETTING}={self.backend} {TYPE_SETTING}={self.weights}"

    @property
    def shown_weights(self) -> str:
        """Their type, and whether an adapter is in them."""
        return f"{self.weights}, merged" if self.merged else self.weights


@dataclass(frozen=True)
class BackendSpeeds:
    """What was measured on one machine; torch first."""

    model: str
    machine: str
    speeds: list[BackendSpeed]
    refusals: list[str]
    """Why a backend does not run the model, in a line each."""
    shares_base: bool
    """Whether torch writes the model in one batch with other adapters on its base."""

    def best(self, streams: int) -> BackendSpeed:
        """The fastest for so many streams; torch where no other one is clearly faster."""
        first, *others = self.speeds
        own = first.tokens_per_second[streams]
        clear = [each for each in others if each.tokens_per_second[streams] > CLEARLY * own]
        return max(clear, key=lambda each: each.tokens_per_second[streams], default=first)

    def advice(self) -> list[str]:
        """A line for each number of streams, and what else there is to know."""
        lines = []
        for streams, own in self.speeds[0].tokens_per_second.items():
            best = self.best(streams)
            text = f"{streams} stream{'s' * (streams != 1)}: "
            if best.setting:
                times = best.tokens_per_second[streams] / own
                text += f"{best.setting} writes {times:.1f} times as fast as torch"
                text += f", {best.nats:.1g} nats a token from it" if best.nats is not None else ""
            else:
                text += "torch, which needs no setting"
            lines.append(text)
        if self.shares_base and len(self.speeds) > 1:
            lines.append(
                "Beside other adapters on its base set nothing: torch writes all of them in one batch. "
                "Merged, and by llama.cpp, each is a model of its own."
            )
        return [*lines, *self.refusals]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.model,
            "machine": self.machine,
            "speeds": [
                {
                    "backend": each.backend,
                    "weights": each.weights,
                    "merged": each.merged,
                    "tokens_per_second": {
                        str(streams): round(speed, 1)
                        for streams, speed in each.tokens_per_second.items()
                    },
                    "nats": each.nats,
                    "setting": each.setting,
                }
                for each in self.speeds
            ],
            "best": {
                str(streams): self.best(streams).setting or "torch"
                for streams in self.speeds[0].tokens_per_second
            },
            "refusals": self.refusals,
        }


def backend_speeds(
    stored: StoredModel,
    streams: Sequence[int],
    types: Sequence[Quantization],
    note: Callable[[str], None] = lambda text: None,
) -> BackendSpeeds:
    """Measure torch, and llama.cpp with weights of ``types``, where it can run the model.

    Raises:
        RecipeError: for a model that writes no text, or numbers of streams that cannot be measured.
    """
    from luthier.engine.machine import choose_machine, machine_name
    from luthier.models.description import check_folder
    from luthier.serving.opened_model import open_by_torch
    from luthier.store.models import adaptation_of, can_share_base, check_writes, room_of

    check_writes(stored, "so there are no tokens a second to measure")
    if not streams or min(streams) < 1 or max(streams) > 64:
        raise RecipeError("streams are from 1 to 64: fewer do not write, and more take turns")
    entry = BACKENDS["llama.cpp"]
    refusals: list[str] = []
    vocabulary = int(check_folder(stored.network_folder)["vocab_size"])
    with ExitStack() as opened:
        note(f"Loading {stored.id} …")
        shares = can_share_base(stored)
        own = open_by_torch(stored, exact=True, beside=shares)
        opened.callback(own.close)
        dtype = str(own.network.dtype).removeprefix("torch.")
        backends: list[tuple[BackendSpeed, Backend]] = [
            (BackendSpeed("torch", dtype, {}), own.backend)
        ]
        if shares and adaptation_of(stored).mergeable:
            merged = open_by_torch(stored, exact=True, beside=False)
            opened.callback(merged.close)
            parity = stored.manifest.parity
            nats = parity.next_tokens.mean_kl if parity and parity.next_tokens else None
            backends.append((BackendSpeed("torch", dtype, {}, nats, merged=True), merged.backend))
        for kind in types:
            try:
                entry.check()
                assert entry.open_file is not None
                note(f"Writing its {kind} file and comparing the two, where that was not done …")
                file = gguf_of(stored, kind, entry.open_file)
                backend = entry.open_file(file, room_of(stored), vocabulary)
            except RefusedInput as error:
                if (reason := f"llama.cpp: {error}") not in refusals:
                    refusals.append(reason)
                continue
            opened.callback(backend.close)
            backends.append((BackendSpeed(entry.id, kind, {}, parity_of(file).mean_kl), backend))
        speeds = [speed for speed, _ in backends]
        for count in sorted(set(streams)):
            note(f"Writing {count} stream{'s' * (count != 1)} …")
            found = _tokens_per_second([each[-1] for each in backends], count, vocabulary)
            for speed, best in zip(speeds, found, strict=True):
                speed.tokens_per_second[count] = best
            texts = (
                f"{speed.backend} {speed.shown_weights} {best:.0f}"
                for speed, best in zip(speeds, found, strict=True)
            )
            note(f"  {', '.join(texts)} tokens a second")
    chosen = choose_machine()
    machine = f"{machine_name(chosen.device)}; {chosen.reason}"
    return BackendSpeeds(stored.id, machine, speeds, refusals, shares)


def _tokens_per_second(backends: Sequence[Backend], streams: int, vocabulary: int) -> list[float]:
    """Of each backend, the best of a few turns that alternate: a machine is seldom quiet."""
    rng = np.random.default_rng(0)
    ids_T: IntArray = rng.integers(0, vocabulary, PROMPT_TOKENS)
    # Tokens at random, others in each turn: what repeats is guessed, and its rows are not computed.
    turns: list[list[list[int]]] = rng.integers(0, vocabulary, (TURNS, STEPS, streams)).tolist()
    best = [0.0] * len(backends)
    with ExitStack() as begun:
        states: list[list[Any]] = []
        for backend in backends:
            state, logits = backend.open(ids_T), None
            while logits is None:
                (logits,) = backend.prefill([state])
            rows = backend.fork(state, streams)
            for row in rows:
                begun.callback(backend.free, row)
            states.append(rows)
        for tokens in turns:
            for place, (backend, rows) in enumerate(zip(backends, states, strict=True)):
                backend.step(rows, tokens[0])  # brings the weights into their order
                began = time.perf_counter()
                for row_tokens in tokens[1:]:
                    backend.step(rows, row_tokens)
                seconds = time.perf_counter() - began
                best[place] = max(best[place], streams * (STEPS - 1) / seconds)
    return best
