"""Generation of text for a prompt, and the tasks that train bases for other tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Task

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat


class GenerationTask(Task):
    """Replies and continuations."""

    head: ClassVar[HeadKind] = "causal_lm"
    writes: ClassVar[bool] = True
    base_noun: ClassVar[str] = "decoder"

    def check(self, chat: ChatFormat) -> None:
        """Reject an encoder-decoder without the first token of a reply."""
        if chat.decoder is not None:
            chat.decoder.check()

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Chat, or describe an image."""
        if chat.template.images is not None:
            return f'generate {model_id} "some text" --image photo.png'
        return f"chat {model_id}"


class PretrainingTask(Task):
    """Base class of tasks whose models are bases for other tasks."""

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Train the model for another task."""
        return f"tune DATA --base {model_id}"


class MaskedWordsTask(PretrainingTask):
    """Words behind masks."""

    head: ClassVar[HeadKind] = "masked_lm"
    base_noun: ClassVar[str] = "masked language model"


class BidirectionalTask(PretrainingTask):
    """Words from the text on either side."""

    head: ClassVar[HeadKind] = "bidirectional_lm"


GENERATION, MASKED_WORDS, BIDIRECTIONAL = GenerationTask(), MaskedWordsTask(), BidirectionalTask()
