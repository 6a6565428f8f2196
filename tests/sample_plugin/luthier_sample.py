"""What a package outside adds to luthier: an objective, an adaptation, a grader and a base model."""

import os
import shutil
from pathlib import Path
from typing import Literal

from luthier.adaptations import Adaptation
from luthier.graders import Grader
from luthier.models.catalog import CatalogEntry
from luthier.objectives import Classification
from luthier.types import Loss


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

    def adapter_config(self, model, base):
        """A file of luthier's own."""
        return self.own_config(base)

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
