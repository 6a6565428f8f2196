"""Generation of text for a prompt, and the tasks that train bases for other tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat


class Generation(Task):
    """Replies and continuations."""

    head: ClassVar[HeadKind] = "causal_lm"
    writes: ClassVar[bool] = True
    base_noun: ClassVar[str] = "decoder"

    def check(self, chat: ChatFormat) -> None:
        """Reject an encoder-decoder without the first token of a reply."""
        chat.check_decoder()


class MaskedWords(Task):
    """Words behind masks. The model is a base for other tasks."""

    head: ClassVar[HeadKind] = "masked_lm"
    base_noun: ClassVar[str] = "masked language model"


class Bidirectional(Task):
    """Words from the text on either side. The model is a base for other tasks."""

    head: ClassVar[HeadKind] = "bidirectional_lm"


GENERATION, MASKED_WORDS, BIDIRECTIONAL = Generation(), MaskedWords(), Bidirectional()
