"""What a teacher says of the rows a student learns from.

Both see the same rows, but not the same nodes: one may have a soft prompt, or not share prefixes. They
meet at the learned tokens, whose order is that of the rows.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from luthier.errors import RecipeError
from luthier.objectives.logprobs import scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch
    from luthier.objectives.base import Objective
    from luthier.objectives.divergence import Given

LARGER = 1.05
"""Up to this ratio a student is not called larger than its teacher: an adapter adds to the weights."""


@torch.no_grad()
def whole_distribution(
    network: Network, teacher: Network, batch: TreeBatch, temperature: float
) -> Given:
    """The teacher's log-probabilities of all tokens at the positions of ``batch``.

    The teacher reads the rows here, one micro-batch at a time: hidden states of all rows of a
    measurement would not fit. Tokens that only one of both has embeddings for are left out.
    """
    (seen,) = teacher.batches(batch.tree.examples, sys.maxsize)
    states_SH = teacher.before_vocabulary(teacher.hidden(seen)[seen.source_S])
    place_S = torch.zeros_like(batch.source_S)
    place_S[batch.edge_source_E[batch.learned[1]]] = seen.edge_source_E[seen.learned[1]]
    states_SH = states_SH[place_S]
    shared = min(len(network.head_VH), len(teacher.head_VH))

    def given(rows: slice) -> tuple[None, torch.Tensor]:
        logits_CV = scores(states_SH[rows], teacher.head_VH, teacher.head_bias_V, temperature)
        return None, logits_CV[:, :shared].log_softmax(-1)

    return given


def check_writer(teacher: Objective) -> None:
    """Refuse a teacher that writes no text."""
    if teacher.task != "causal_lm":
        raise RecipeError(
            f"the teacher was tuned with {teacher.method}, and gives no distribution over the next "
            "token. Take a model that writes text; classifiers are distilled with encoder_distillation."
        )


def check_same_tokens(teacher: ChatFormat, student: ChatFormat) -> None:
    """Refuse a teacher that reads other tokens, or another form of text, than the student."""
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    # Tokens that only one of both has are let be: many models add some that no row uses.
    shared = theirs.keys() & ours.keys()
    moved = [token for token in sorted(shared) if theirs[token] != ours[token]]
    lacking = min(len(theirs), len(ours)) - len(shared)
    if moved or lacking:
        example = f" ({moved[0]!r} is {theirs[moved[0]]} and {ours[moved[0]]})" if moved else ""
        raise RecipeError(
            "teacher and student have different tokenizers, so their distributions are over different "
            f"tokens: {len(theirs):,} and {len(ours):,} tokens, {lacking:,} of the fewer without a "
            f"counterpart, {len(moved):,} with another id{example}. Let the student learn from what the "
            "teacher writes (luthier distil --method responses), or take a student of the teacher's "
            "family."
        )
    if (teacher.start_id is None) != (student.start_id is None):
        raise RecipeError(
            "one of teacher and student is an encoder-decoder and the other is not, so they do not read "
            "the same rows. Let the student learn from what the teacher writes (luthier distil --method "
            "responses)."
        )
    if teacher.template != student.template:
        raise RecipeError(
            f"the teacher was tuned with template={teacher.template}, and the student is to read rows "
            f"with template={student.template}. Use --set objective.template={teacher.template}."
        )


def note_sizes(network: Network, teacher: Network, note: Callable[[str], None]) -> None:
    """Tell people where the student is the larger one."""
    ours, theirs = (sum(w.numel() for w in n.model.parameters()) for n in (network, teacher))
    if ours > LARGER * theirs:
        note(
            f"the student has more weights than its teacher ({ours:,} and {theirs:,}): distilling makes "
            "it no better than the teacher, and tuning it on the data itself may"
        )
