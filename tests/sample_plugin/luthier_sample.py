"""What a package outside adds to luthier: objective, adaptation, grader, base model, backend."""

import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from luthier.adaptations import Adaptation
from luthier.cli.terminal.bridge import Command
from luthier.data.tree import build_tree
from luthier.graders import Grader
from luthier.models.catalog import CatalogEntry
from luthier.models.decoding.backends import BackendEntry
from luthier.objectives import Classification
from luthier.types import Example, Loss


class Focal(Classification):
    """Cross-entropy that counts rows already known for less (Lin et al. 2017, arXiv:1708.02002)."""

    method: Literal["focal"] = "focal"
    gamma: float = 2.0
    """How much less; 0 is plain cross-entropy."""

    def loss(self, network, batch):
        """Summed focal loss."""
        import torch

        target_R = torch.tensor([int(target[0]) for target in batch.tree.targets])
        logp_RC = network.row_scores(batch).float().log_softmax(-1)
        logp_R = logp_RC.gather(1, target_R[:, None])[:, 0]
        right_R = logp_RC.argmax(-1) == target_R
        each_R = -((1 - logp_R.exp()) ** self.gamma) * logp_R
        return Loss(each_R.sum(), ratios={"accuracy": (right_R.tolist(), [1] * len(right_R))})


class Norms(Adaptation):
    """Only the weights of norms move (Zhao et al. 2023, arXiv:2312.11420)."""

    method: Literal["norms"] = "norms"

    def adapt(self, model):
        """Freeze everything but the norms."""
        for name, weight in model.named_parameters():
            weight.requires_grad_("norm" in name.lower())

    def learning_rate(self, hidden):
        """As for other few weights."""
        return 3e-3, "few weights train"


class Brief(Grader):
    """1 for a reply of few words."""

    method: Literal["brief"] = "brief"
    words: int = 5
    """How many at most."""

    needs_expected = False

    def score(self, answer):
        """1 or 0."""
        return float(len(answer.reply.split()) <= self.words)


class Folder:
    """A model in a folder of this machine."""

    @property
    def provenance(self):
        """What a manifest says of it."""
        return {"source": "folder:SAMPLE_MODEL"}

    def fetch(self, target, say):
        """Copy the folder's files."""
        shutil.copytree(Path(os.environ["SAMPLE_MODEL"]), target, dirs_exist_ok=True)
        return self.provenance


TINY = CatalogEntry(
    id="sample-tiny",
    source=Folder(),
    kind="encoder",
    languages=("en",),
    parameters=50_000,
    context=64,
    licence="Apache-2.0",
    download_bytes=0,
    disk_bytes=1_000_000,
    about="made for a test",
    config={"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 320},
)  # fmt: skip


class Recomputing:
    """Keeps no keys and values: every step reads all of each sequence again."""

    rows, sequences = 1, 1 << 20

    def __init__(self, network, context):
        self.network, self.context, self.device = network, context, network.device

    def bytes_of(self, tokens):
        """Token ids are all that is kept."""
        return 8 * tokens

    def open(self, ids_T):
        """A sequence is the list of its tokens."""
        return Tokens([int(i) for i in ids_T], unread=len(ids_T))

    def prefill(self, states):
        """All at once."""
        for state in states:
            state.unread = 0
        return [self.logits(state) for state in states]

    def prefill_batch(self, prompts, copies):
        """One after the other."""
        import torch

        states = [self.open(ids_T) for ids_T in prompts for _ in range(copies)]
        return states, torch.stack(self.prefill(states))

    def fork(self, state, copies):
        """Copies of the list."""
        return [Tokens(list(state.ids)) for _ in range(copies)]

    def step(self, states, tokens):
        """Append a token to each."""
        import torch

        for state, token in zip(states, tokens, strict=True):
            state.ids.append(token)
        return torch.stack([self.logits(state) for state in states])

    def free(self, state):
        """Nothing is held elsewhere."""

    def close(self):
        """The same."""

    def logits(self, state):
        """Of the next token."""
        import torch

        ids_T = np.array(state.ids, dtype=np.int64)
        row = Example(ids_T, np.zeros(len(ids_T), dtype=np.float32), 0)
        with torch.no_grad():
            batch = self.network.batch(build_tree([row], False))
            return self.network.logits(self.network.hidden(batch)[batch.tree.leaf_R])[0]


class Tokens:
    """A sequence."""

    def __init__(self, ids, unread=0):
        """``unread`` tokens are left of its prompt."""
        self.ids, self.unread = ids, unread


RECOMPUTING = BackendEntry("recomputing", Recomputing)


def read_verses(path, on_record):
    """Yield a record for each block of lines, with the number of the first line."""
    line = 1
    for number, verse in enumerate(Path(path).read_text().split("\n\n"), 1):
        on_record(number, number)
        yield line, {"text": verse.strip()}
        line += verse.count("\n") + 2


def count_verses(path: Path, *, least: int = 1) -> dict[str, int]:
    """Count verses.

    Args:
        path: File of verses.
        least: Minimum number of lines.

    Returns:
        The number of verses.
    """
    verses = [record for _, record in read_verses(path, lambda done, total: None)]
    return {"verses": sum(len(each["text"].splitlines()) >= least for each in verses)}


COUNT_VERSES = Command(count_verses, print, "count-verses")
