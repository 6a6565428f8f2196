"""The llama.cpp backend: a GGUF file, token ids as input, logits as output.

The wheel ``xllamacpp`` exposes only a server with its own templates, sampling and scheduling. This
module therefore calls the C functions of the shared library directly (``llama.h``). The functions
take structures by value, and their layout changes between versions, so other versions of the wheel
are rejected.

llama.cpp aborts the process on invalid arguments. Lengths, ids and capacities are checked before
each call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.data.tree import round_up
from luthier.errors import RecipeError
from luthier.models.decoding.backends import (
    LLAMA_CPP,
    llama_cpp_library,
    read_prompts,
)

if TYPE_CHECKING:
    from luthier.models.decoding.backends import State
    from luthier.types import IntArray

SEQUENCES = 128
"""Maximum number of sequences. The library supports 256, but allocates logits for all."""
CHUNK = 256
"""Number of prompt tokens per prefill call. Other sequences can step between two chunks."""
CELLS = 1024
"""Initial capacity of a context, in tokens."""
_CELL_STEP = 256
"""The library rounds rooms up to multiples of this."""


class _ModelParams(ctypes.Structure):
    """The front of ``llama_model_params``, and more than enough room for the rest."""

    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("rest", c_int8 * 256),
    ]


class _ContextParams(ctypes.Structure):
    """``llama_context_params`` up to the booleans, with enough padding for the remaining fields."""

    _fields_: ClassVar = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, c_uint32) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *(
            (name, c_int32)
            for name in ("ctx_type", "rope_scaling", "pooling", "attention", "flash")
        ),
        ("numbers", c_float * 8),
        ("callbacks", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort", c_void_p * 3),
        *(
            (name, c_bool)
            for name in ("embeddings", "offload", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        ("rest", c_int8 * 256),
    ]


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ERROR_LEVEL = 4
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int32]),
}


class _Library:
    """The C functions of the wheel and the library's last log message."""

    def __init__(self) -> None:
        file = llama_cpp_library()
        if file is None:
            raise RecipeError(f"Cannot load llama.cpp: {LLAMA_CPP} has no shared library.")
        try:
            # torch is already loaded, so both use torch's OpenMP runtime.
            self._functions = ctypes.CDLL(str(file))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise RecipeError(f"Cannot load llama.cpp: {error}") from error
        self.errors: list[str] = []
        # Keep a reference: the library calls this function until exit.
        self._log = _LOG(self._on_log)
        self.llama_log_set(self._log, None)
        # llama.h: once per process, so _library() is cached.
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def _on_log(self, level: int, text: bytes | None, _: Any) -> None:
        if level == _ERROR_LEVEL and text:
            self.errors = [*self.errors[-3:], text.decode("utf-8", "replace").strip()]


@cache
def _library() -> _Library:
    return _Library()


class _Sequence:
    """A sequence of :class:`LlamaCppBackend`."""

    def __init__(self, ids_T: IntArray, place: int) -> None:
        self.ids_T, self.place, self.length = ids_T, place, 0
        self.read = 0

    @property
    def unread(self) -> int:
        return len(self.ids_T) - self.read


class LlamaCppBackend:
    """A network from a GGUF file. Thread-safe.

    All sequences share a unified cache, so copies of a prompt share its cells. The cache grows on
    demand and shrinks when empty.
    """

    rows = sequences = SEQUENCES

    def __init__(self, file: Path, context: int, vocabulary: int) -> None:
        """Open a file; see :data:`luthier.models.decoding.backends.OpenFile`.

        Raises:
            RecipeError: if the library or the file cannot be loaded.
        """
        self.context, self.vocabulary, self.device = context, vocabulary, torch.device("cpu")
        self._library, self._file = _library(), file
        self._threads = torch.get_num_threads()
        self._lock = threading.RLock()
        self._sequences: list[_Sequence] = []
        self._free_places = list(range(SEQUENCES))
        self._context: int | None = None
        self._cells = self._used = 0
        params = self._library.llama_model_default_params()
        model = self._library.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise self._failure("cannot read")
        self._model: int | None = model
        # One buffer for all calls: a step has at most SEQUENCES rows, fewer than CHUNK.
        self._batch = self._library.llama_batch_init(CHUNK, 0, 1)
        size = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))
        try:
            if size != vocabulary:
                raise RecipeError(
                    f"{file} has {size} tokens, but the network has {vocabulary}.",
                    rule="gguf.vocabulary",
                )
            # The library reports the size of a stored sequence, so one token gives the bytes per token.
            state = self._add(np.zeros(1, dtype=np.int64))
            self._read(state)
            size_of = self._library.llama_state_seq_get_size
            self._bytes: int = size_of(self._context, state.place)
            self.free(state)
        except BaseException:
            self.close()
            raise

    def bytes_of(self, tokens: int) -> int:
        """Return the memory of a sequence. Doubled, because growth by half copies the cache."""
        return 2 * tokens * self._bytes

    def open(self, ids_T: IntArray) -> State:
        """A sequence with nothing read."""
        if not len(ids_T) or not 0 <= int(ids_T.min()) <= int(ids_T.max()) < self.vocabulary:
            raise ValueError("prompts must have tokens, and all tokens must be in the vocabulary")
        if len(ids_T) > self.context:
            raise ValueError(f"the prompt has {len(ids_T)} tokens, the context is {self.context}")
        with self._lock:
            return self._add(ids_T)

    def prefill(self, states: Sequence[Any]) -> list[Tensor | None]:
        """Prefill the next chunk of each prompt separately. Batched chunks would round differently."""
        with self._lock:
            self._check_open(states)
            return [self._read(state) for state in states]

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Prefill the prompts separately, so that results do not depend on other prompts."""
        return read_prompts(self, prompts, copies)

    def fork(self, state: Any, copies: int) -> list[State]:
        """Return ``state`` and copies that share the prompt's cells."""
        with self._lock:
            self._check_open([state])
            self._check_places(copies - 1)
            made: list[State] = [state]
            for _ in range(copies - 1):
                copy = self._add(state.ids_T)
                copy.read, copy.length = state.read, state.length
                self._used += copy.length
                # -1, -1: all positions. The cells are shared, not copied.
                self._library.llama_memory_seq_cp(self._memory, state.place, copy.place, -1, -1)
                made.append(copy)
            return made

    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """Append a token to each sequence in a single batch."""
        with self._lock:
            self._check_open(states)
            if any(state.unread or state.length >= self.context for state in states):
                raise ValueError("a sequence has an unread prompt or a full context")
            if not all(0 <= token < self.vocabulary for token in tokens):
                raise ValueError("a token is not in the vocabulary")
            self._room(len(states))
            for index, (state, token) in enumerate(zip(states, tokens, strict=True)):
                self._put(index, token, state.length, state.place)
            # Lengths change after the call, so an error leaves them as they are.
            logits_RV = self._decode(len(states), range(len(states)))
            for state in states:
                state.length += 1
            self._used += len(states)
            return logits_RV

    def free(self, state: Any) -> None:
        """Free the sequence's cells. The last sequence resets the cache to its initial size."""
        with self._lock:
            if state not in self._sequences:
                return
            self._sequences.remove(state)
            self._free_places.append(state.place)
            self._used -= state.length
            if self._context is not None:
                self._library.llama_memory_seq_rm(self._memory, state.place, -1, -1)
            if not self._sequences and self._cells > CELLS:
                self._end_context()

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._sequences, self._used = [], 0
            self._end_context()
            if self._model is not None:
                self._library.llama_batch_free(self._batch)
                self._library.llama_model_free(self._model)
                self._model = None

    # Callers of the following methods must own the lock.

    @property
    def _memory(self) -> int:
        memory: int = self._library.llama_get_memory(self._context)
        return memory

    def _add(self, ids_T: IntArray) -> _Sequence:
        if self._model is None:
            raise RuntimeError("the backend is closed")
        self._check_places(1)
        sequence = _Sequence(ids_T, self._free_places.pop())
        self._sequences.append(sequence)
        return sequence

    def _check_places(self, count: int) -> None:
        if count > len(self._free_places):
            raise RuntimeError(f"llama.cpp supports at most {SEQUENCES} sequences")

    def _check_open(self, states: Sequence[_Sequence]) -> None:
        places = {state.place for state in states}
        if len(places) < len(states) or any(state not in self._sequences for state in states):
            raise RuntimeError("a sequence is freed or repeated")

    def _put(self, index: int, token: int, position: int, place: int) -> None:
        batch = self._batch
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, place
        batch.logits[index] = 0

    def _read(self, state: _Sequence) -> Tensor | None:
        ids = state.ids_T[state.read : state.read + CHUNK].tolist()
        if not ids:
            return None
        self._room(len(ids))
        for index, token in enumerate(ids):
            self._put(index, token, state.length + index, state.place)
        ends = len(ids) == state.unread
        logits_RV = self._decode(len(ids), [len(ids) - 1] if ends else [])
        state.read += len(ids)
        state.length += len(ids)
        self._used += len(ids)
        return logits_RV[0] if ends else None

    def _decode(self, tokens: int, outputs: Sequence[int]) -> Tensor:
        """Run the tokens of the batch; return the logits ``[R, V]`` of the tokens ``outputs``."""
        for index in outputs:
            self._batch.logits[index] = 1
        self._batch.n_tokens = tokens
        self._library.errors.clear()
        result = self._library.llama_decode(self._context, self._batch)
        if result:
            raise self._failure(f"gave {result} for")
        if not outputs:
            return torch.empty(0, self.vocabulary)
        logits = self._library.llama_get_logits(self._context)
        # A copy: the next call writes to the same memory.
        return torch.from_numpy(
            np.ctypeslib.as_array(logits, (len(outputs), self.vocabulary)).copy()
        )

    def _room(self, tokens: int) -> None:
        """Make room for ``tokens`` more tokens.

        Copies that share a prompt are counted whole, as a larger room keeps each apart.
        """
        needed = self._used + tokens
        if self._context is None:
            self._context, self._cells = self._new_context(max(CELLS, needed))
        elif needed > self._cells:
            # The old context lives until all sequences are copied, so an error loses none.
            old, (new, cells) = self._context, self._new_context(max(needed, self._cells * 3 // 2))
            try:
                for sequence in self._sequences:
                    if sequence.length:
                        self._move(old, new, sequence.place)
            except BaseException:
                self._library.llama_free(new)
                raise
            self._context, self._cells = new, cells
            self._library.llama_free(old)

    def _move(self, old: int, new: int, place: int) -> None:
        size = self._library.llama_state_seq_get_size(old, place)
        data = ctypes.create_string_buffer(size)
        if self._library.llama_state_seq_get_data(old, data, size, place) != size:
            raise self._failure("cannot copy a sequence of")
        if self._library.llama_state_seq_set_data(new, data, size, place) != size:
            raise self._failure("cannot copy a sequence of")

    def _new_context(self, cells: int) -> tuple[int, int]:
        cells = round_up(cells, _CELL_STEP)
        params = self._library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, CHUNK, CHUNK
        params.n_seq_max = params.n_outputs_max = SEQUENCES
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        self._library.errors.clear()
        made = self._library.llama_init_from_model(self._model, params)
        if not made:
            raise self._failure(f"has no memory for {cells} tokens of")
        return made, cells

    def _end_context(self) -> None:
        if self._context is not None:
            self._library.llama_free(self._context)
        self._context, self._cells = None, 0

    def _failure(self, what: str) -> RecipeError:
        reason = f": {'; '.join(self._library.errors)}" if self._library.errors else ""
        return RecipeError(f"llama.cpp {what} {self._file}{reason}", rule="gguf.unreadable")
