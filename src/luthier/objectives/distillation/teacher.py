"""Teacher distributions at the learned tokens: computed in each step, or cached on disk.

Student and teacher compute the same rows, but possibly different tree nodes: a network may have a
soft prompt, or not share prefixes. The learned tokens are the common index, in row order.

The cache (:class:`TopK`) contains the likeliest tokens at every learned token of all rows. The
teacher runs once per row, independent of the number of epochs, and is freed afterwards. A learned
token takes ``8 k + 4`` bytes: ``k`` ids, and ``k + 1`` log-probabilities with all other tokens
last. The log-probabilities include the temperature of the run.
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.files import need_disk, read_json, write_json
from luthier.objectives.distillation.divergence import CHUNK, FLOOR
from luthier.objectives.logprobs import scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives.distillation.divergence import Distribution
    from luthier.types import Example, IntArray

_IDS, _LOGP, _DONE = "teacher-ids.bin", "teacher-logp.bin", "teacher.json"


@torch.no_grad()
def whole_distribution(
    network: Network,
    teacher: Network,
    batch: TreeBatch,
    temperature: float,
    rows: Sequence[Example] | None = None,
) -> Distribution:
    """Return the teacher's log-probabilities of all tokens at the positions of ``batch``.

    The teacher runs here, one micro-batch at a time, because the states of all rows of a
    measurement would not fit in memory. ``rows`` replaces the rows of the batch as input; both must
    end with the same learned tokens. Tokens without an embedding in either network are excluded.
    """
    # The teacher may be the trained network (sdft), whose batches are split over processes.
    with teacher.whole_work():
        # One batch: the limit of the student's micro-batch already bounds the tokens.
        (seen,) = teacher.batches(batch.tree.examples if rows is None else rows, sys.maxsize)
    states_SH = teacher.before_vocabulary(teacher.hidden(seen, seen.source_S))
    # Nodes of both trees differ, and learned tokens correspond. Padding keeps 0, without weight.
    place_S = torch.zeros_like(batch.source_S)
    place_S[batch.edge_source_E[batch.learned_edges[1]]] = seen.edge_source_E[seen.learned_edges[1]]
    states_SH = states_SH[place_S]
    shared = min(len(network.head_VH), len(teacher.head_VH))
    # `detach` binds the storage of now: sdft calls this in `at_start`, which swaps the weights
    # back before the first call of `distribution`.
    head_VH, bias_V, cap = teacher.head_VH.detach(), teacher.head_bias_V, teacher.logit_cap
    bias_V = bias_V if bias_V is None else bias_V.detach()

    def distribution(chunk: slice) -> tuple[None, torch.Tensor]:
        logits_CV = scores(states_SH[chunk], head_VH, bias_V, temperature, cap)
        return None, logits_CV[:, :shared].log_softmax(-1)

    return distribution


class TopK:
    """The teacher's likeliest tokens of each row on disk, looked up by the row's tokens."""

    def __init__(self, rows: Sequence[Example], k: int, folder: Path, key: str) -> None:
        self.k, self._folder, self._key = k, folder, key
        self._start: dict[bytes, int] = {}
        size = 0
        for row in rows:
            if _key(row) not in self._start:
                self._start[_key(row)] = size
                size += int(np.count_nonzero(row.weight_T))
        self._shapes = {_IDS: (size, k), _LOGP: (size, k + 1)}
        self.bytes = size * (8 * k + 4)

    @staticmethod
    def of(
        teacher: Network,
        rows: Sequence[Example],
        budget: int,
        k: int,
        temperature: float,
        vocabulary: int,
        folder: Path,
    ) -> TopK:
        """Run the teacher on ``rows``, at most ``budget`` tokens per pass, or open existing files.

        Only the first ``vocabulary`` tokens of the teacher are used.
        """
        # A resumed run opens the files only for the same rows, order and settings.
        digest = hashlib.sha256(repr((k, temperature, vocabulary)).encode())
        for row in rows:
            digest.update(_key(row))
        # topk fails for k above the number of tokens.
        cache = TopK(rows, min(k, vocabulary), folder, digest.hexdigest())
        if not cache.complete():
            cache._write(teacher, rows, budget, temperature, vocabulary)
        return cache

    def complete(self) -> bool:
        """Return true if the files exist for the same rows and settings."""
        done = self._folder / _DONE
        return done.is_file() and read_json(done).get("key") == self._key

    @torch.no_grad()
    def _write(
        self,
        teacher: Network,
        rows: Sequence[Example],
        budget: int,
        temperature: float,
        vocabulary: int,
    ) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        need_disk(self._folder, self.bytes, "keeping what the teacher says of the rows")
        ids_MK, logp_MB = self._open("w+")
        # Equal rows share a slot, so the teacher computes one of them.
        for batch in teacher.batches(list({_key(row): row for row in rows}.values()), budget):
            states_SH = teacher.before_vocabulary(teacher.hidden(batch, batch.source_S))
            head = teacher.head_VH, teacher.head_bias_V, temperature, teacher.logit_cap
            parts = []
            for chunk_CH in states_SH.split(CHUNK):
                logits_CV = scores(chunk_CH, *head)
                parts.append(likeliest(logits_CV[:, :vocabulary].log_softmax(-1), self.k))
            source_M = batch.edge_source_E[batch.learned_edges[1]]
            slot_M = self._slots(batch)
            ids_MK[slot_M] = torch.cat([ids for ids, _ in parts])[source_M].cpu().numpy()
            logp_MB[slot_M] = torch.cat([logp for _, logp in parts])[source_M].cpu().numpy()
        # The marker comes last: files of a run killed before are incomplete and written again.
        ids_MK.flush()
        logp_MB.flush()
        write_json(self._folder / _DONE, {"key": self._key, "k": self.k, "bytes": self.bytes})

    def distribution(self, batch: TreeBatch) -> Distribution:
        """Return the stored distribution at the positions of ``batch``."""
        ids_MK, logp_MB = self._open("r")
        slot_M, device = self._slots(batch), batch.source_S.device
        source_M = batch.edge_source_E[batch.learned_edges[1]]
        positions = len(batch.source_S)
        # Padding positions have no weight, so zeros are as good as any numbers.
        ids_SK = torch.zeros(positions, self.k, dtype=torch.int64, device=device)
        logp_SB = torch.zeros(positions, self.k + 1, device=device)
        # int32 on disk, for `8 k + 4` bytes per token; `gather` requires int64.
        ids_SK[source_M] = torch.from_numpy(ids_MK[slot_M].astype(np.int64)).to(device)
        logp_SB[source_M] = torch.from_numpy(logp_MB[slot_M]).to(device)
        # A copy, because the divergence overwrites the log-probabilities.
        return lambda rows: (ids_SK[rows], logp_SB[rows].clone())

    def _slots(self, batch: TreeBatch) -> IntArray:
        """Return the file positions of the learned tokens of ``batch``, in the order of
        ``learned_edges``."""
        return np.concatenate(
            [
                self._start[_key(row)] + np.arange(np.count_nonzero(row.weight_T))
                for row in batch.tree.examples
            ]
        )

    def _open(self, mode: Any) -> tuple[Any, Any]:
        kinds = {_IDS: np.int32, _LOGP: np.float32}
        ids_MK, logp_MB = (
            np.memmap(self._folder / name, dtype=kind, mode=mode, shape=self._shapes[name])
            for name, kind in kinds.items()
        )
        return ids_MK, logp_MB


def likeliest(logp_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ids ``[C, k]`` of the likeliest tokens, and log-probabilities ``[C, k + 1]`` with the
    rest."""
    best_CK, ids_CK = logp_CV.topk(k)
    rest_C1 = logp_CV.scatter(-1, ids_CK, -math.inf).logsumexp(-1, keepdim=True)
    return ids_CK, torch.cat([best_CK, rest_C1.clamp_min(FLOOR)], -1)


def _key(row: Example) -> bytes:
    """Return a key of the tokens and learned positions; equal rows share one cache entry."""
    source = b"" if row.source_T is None else row.source_T.tobytes()
    # Positions, not weights: weights change the loss, not the teacher's distribution.
    learned = np.flatnonzero(row.weight_T)
    return b"/".join([source, row.ids_T.tobytes(), learned.tobytes()])
