"""Image to text: transcription of text lines, or captions (TrOCR, Li et al. 2021,
arXiv:2109.10282).

An encoder processes the image and a decoder generates the text. The loss is the cross-entropy of
the text tokens, including the end token, averaged over all tokens of the global batch. On held-out
rows the network also generates each text with greedy decoding, and the metrics are character and
word error rates.

A network with random weights must learn where to look on a line before any letter, and makes no
progress until then. A second loss (``ctc_weight``) helps: connectionist temporal classification
(Graves et al. 2006) of the encoder's columns by a linear layer that is discarded after training
(Watanabe et al. 2017, section II-B; measurements in docs/log/media.md).

Networks without a decoder, such as ``pp-ocrv6-small``, train with CTC alone, averaged over the rows.
The text of a line is the likeliest class of each column, without repetitions and blanks. Letters
of the training rows that are unknown to the base model become new classes.

Not implemented from the paper: pre-training on pages, augmentation, beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes import SHAPES
from luthier.data.shapes.media import CaptionedImage, MediaRow
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.transcription import character_errors, word_errors
from luthier.media.tasks import TRANSCRIPTION
from luthier.models.networks.heads import Head
from luthier.models.networks.modalities import COLUMN_WIDTH, is_ctc_recognizer
from luthier.objectives.base import Objective, RunModels, TrainingDefaults, chat_of
from luthier.objectives.means import MOST_ROW_SCORES
from luthier.tasks import Task
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

CTC_LAYER = "columns_to_letters"
"""Name of the CTC layer, which exists only in training."""
CTC_WEIGHT = 0.5
LENGTH_MARGIN = 1.25
"""Maximum length of a generated text relative to the longest training text."""
BLANK = 0
"""Class of a column between two letters, in networks without a decoder."""


class ImageToText(Objective):
    """Text of an image: a line of handwriting or print, or a caption.

    Use ``classification`` for a fixed set of labels, or ``contrastive`` to search images by
    caption.
    """

    method: Literal["image_to_text"] = "image_to_text"
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    """Maximum tokens per text. Default: a quarter more than in the longest training text."""

    ctc_weight: float | None = Field(default=None, ge=0, le=100)
    """Weight of CTC on image columns. Default: 0.5 for new line encoders, otherwise 0."""

    letters: str = ""
    """Letters to read in addition to letters of the training rows, without a decoder."""

    task: ClassVar[Task] = TRANSCRIPTION
    shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    measure: ClassVar[str] = "cer"
    allows_augmentation: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=20,
        bases={"image": "pp-ocrv6-small"},
        min_steps=240,
        scratch_steps=3_000,  # the network must learn where to look before any letter
    )

    def bind(self, models: RunModels) -> Self:
        """Reject networks without a text decoder, choose the weight of CTC for the encoder, and keep
        the letters of a custom model."""
        chat, network = models.chat, models.network
        # The format of a network without a decoder does not say what the network predicts.
        reads = (
            chat.decoder is not None
            or network is None
            or is_ctc_recognizer(network.config(self.head()))
        )
        if chat.media is None or not reads:
            raise RecipeError(
                "image_to_text needs an image encoder with a text decoder, or a CTC text recognizer. "
                "Use base=pp-ocrv6-small, base=small-ocr, or a VisionEncoderDecoder of transformers "
                "such as TrOCR",
                rule="objective.network",
            )
        if chat.decoder is not None and self.letters:
            raise RecipeError(
                "`objective.letters` does not apply to a network with a decoder, whose tokenizer "
                "has all letters. Remove the setting",
                setting="objective.letters",
            )
        if chat.decoder is None and isinstance(models.learned, ImageToText):
            # The head of a custom model has its letters before all new letters.
            letters = _distinct(models.learned.letters + self.letters)
            return self.model_copy(update={"letters": letters})
        if network is None or chat.decoder is None or self.ctc_weight is not None:
            return super().bind(models)
        encoder = network.fields.get("encoder", {})
        columns = encoder.get("model_type") == "line_encoder" and models.learned is None
        return self.model_copy(update={"ctc_weight": CTC_WEIGHT if columns else 0.0})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Set the maximum number of tokens from the longest text, or the letters from all texts."""
        texts = [row.caption for row in rows if isinstance(row, CaptionedImage)]
        if chat.decoder is None:
            letters = "".join(sorted({*"".join(texts)}))
            return self.model_copy(update={"letters": _distinct(self.letters + letters)})
        if self.max_tokens is not None:
            return self
        longest = max(len(chat.text_tokenizer.tokens(text, first=False)) for text in texts)
        return self.model_copy(update={"max_tokens": int(LENGTH_MARGIN * longest) + 1})

    def head(self) -> Head:
        """Return the head, with the letters of the training rows."""
        return Head(self.task.head, letters=self.letters)

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layer that predicts the letter of each column, if CTC is used."""
        from torch import nn

        if not self.ctc_weight:
            return {}
        weight = next(model.parameters())
        config: Any = model.config
        # As wide as the decoder's input, which may be projected before.
        project: Any = getattr(model, "enc_to_dec_proj", None)
        width = project.out_features if project else config.encoder.hidden_size
        return {CTC_LAYER: nn.Linear(width, config.decoder.vocab_size, device=weight.device)}

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Encode the image and the tokens of the text; without a text, the start of decoding."""
        chat.check_input_kind(SHAPES[row.shape].reads)
        assert isinstance(row, MediaRow)
        if chat.decoder is None:
            example = chat.encode_input(row, index)
            if not isinstance(row, CaptionedImage):
                return example
            return replace(example, target=np.array([*map(ord, row.caption)]))
        media = chat.media_input(row)
        ids_T = chat.decoder.opening
        if isinstance(row, CaptionedImage):
            ids_T = chat.decoder.ids(row.caption, chat.text_tokenizer)
        weight_T = (np.arange(len(ids_T)) > 0).astype(np.float32)
        return Example(ids_T, weight_T, index, media=media)

    def length_problem(self, example: Example, context: int) -> RowRefused | None:
        """Return a problem if the text needs more columns than the image has, without a decoder."""
        text = example.target
        if text is None or example.media is None:
            return super().length_problem(example, context)
        columns = example.media.processor.shape[-1] // COLUMN_WIDTH
        # CTC separates equal neighbours by a blank column.
        needed = len(text) + np.count_nonzero(text[1:] == text[:-1])
        if needed <= columns:
            return None
        return RowRefused(
            "row.too_long",
            f"the text needs {needed} columns: a column per letter and a column between equal "
            f"letters. The network has {columns} columns.",
            "Cut the line into two images, or set `data.long_rows=drop`.",
        )

    def truncate(self, example: Example, context: int) -> Example:
        """Truncate the text. Without a decoder, reject the row: the image would show more letters."""
        if example.target is not None and (problem := self.length_problem(example, context)):
            raise problem
        return super().truncate(example, context)

    def describe(self, example: Example) -> str:
        """Return the text, if the tokens do not contain the text."""
        return "" if example.target is None else "".join(map(chr, example.target))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of the text tokens, plus the weighted CTC loss in
        training. Without a decoder, return the CTC loss alone."""
        from luthier.objectives.logprobs import weighted_nll

        layout: Any = network.layout
        if is_ctc_recognizer(network.model.config):
            classes = _classes(network.model.config.letters)
            rows = [map(chr, row.target) for row in batch.tree.examples if row.target is not None]
            # Letters of held-out rows alone have no class.
            known = [[classes[letter] for letter in row if letter in classes] for row in rows]
            texts = [np.array(row, dtype=np.int64) for row in known]
            return Loss(ctc_loss(layout.scores(network.model, batch.plan), texts, BLANK))
        if not (self.ctc_weight and network.model.training):
            return Loss(weighted_nll(network, batch))
        encoded_RSH = layout.encode(network.model, batch.plan)
        batch = replace(batch, plan=replace(batch.plan, encoded_RSH=encoded_RSH))
        nll = weighted_nll(network, batch)
        ctc = self._ctc(network, batch, encoded_RSH)
        metrics = {"cross_entropy": float(nll.detach()), "ctc": float(ctc.detach())}
        return Loss(nll + self.ctc_weight * ctc, metrics)

    def _ctc(self, network: Network, batch: TreeBatch, encoded_RSH: Tensor) -> Tensor:
        from luthier.models.networks.heads import padding_id

        layer = network.model.get_submodule(CTC_LAYER)
        scores_RSV = layer(encoded_RSH.to(layer.weight.dtype))
        texts = [row.ids_T[1:-1] for row in batch.tree.examples]
        return ctc_loss(scores_RSV, texts, padding_id(network.model))

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return the loss and the error rates of characters (``cer``, the deciding metric) and
        words (``wer``)."""
        metrics = super().validation_metrics(network, examples, budget)
        replies, references = list[str](), list[str]()
        for batch in network.batches(examples, budget):
            replies += [answer["text"] for answer in self.predict(network, batch)]
            references += [
                self.describe(row) or chat_of(network).replies.decode(row.ids_T[1:].tolist())
                for row in batch.tree.examples
            ]
        pairs = [*zip(replies, references, strict=True)]
        scores = {"cer": character_errors(pairs), "wer": word_errors(pairs)}
        metrics |= {name: each.value for name, each in scores.items()}
        metrics["cer_error"] = scores["cer"].error
        if len(examples) <= MOST_ROW_SCORES:
            metrics["rows"] = {"cer": scores["cer"].plain()}
        return metrics

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return text and probability of each row in the order of the tree.

        ``probability`` covers all tokens, including the end token; without a decoder, the classes of
        all columns. A text of ``max_tokens`` tokens without an end token has ``"cut": True``.
        """
        from luthier.models.decoding.sampler import sample
        from luthier.models.decoding.sampling import Sampling

        chat = chat_of(network)
        if chat.decoder is None:
            return _read_columns(network, batch)
        layout: Any = network.layout
        longest = min(self.max_tokens or network.context, network.context - 1)
        encoded_RSH = layout.encode(network.model, batch.plan)
        samples = sample(
            network,
            [np.array([row]) for row in range(len(batch.tree.examples))],
            1,
            Sampling(temperature=0.0, max_tokens=longest),
            stop_ids=chat.stop_ids,
            encoded_RSH=encoded_RSH,
        )
        answers: list[dict[str, Any]] = []
        for (completion,) in samples:
            text = chat.replies.decode(completion.ids_T.tolist())
            answers.append({"text": text, "probability": float(np.exp(completion.logp_T.sum()))})
            if not completion.stopped:
                answers[-1]["cut"] = True
        return answers


def ctc_loss(scores_RSV: Tensor, texts: Sequence[IntArray], blank: int) -> Tensor:
    """Return the negative log-likelihood of the texts, summed over rows and over all alignments to
    columns."""
    import torch

    logp_SRV = scores_RSV.float().log_softmax(-1).transpose(0, 1)
    columns, rows = logp_SRV.shape[:2]
    loss: Tensor = torch.nn.functional.ctc_loss(
        logp_SRV,
        torch.from_numpy(np.concatenate(texts)).to(logp_SRV.device),
        torch.full((rows,), columns),
        torch.tensor([len(text) for text in texts]),
        blank=blank,
        reduction="sum",
        zero_infinity=True,  # texts with more letters than columns
    )
    return loss


def _distinct(letters: str) -> str:
    return "".join(dict.fromkeys(letters))


@lru_cache(maxsize=8)
def _classes(letters: str) -> dict[str, int]:
    return {letter: place for place, letter in enumerate(letters, BLANK + 1)}


def _read_columns(network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
    """Return text and probability of the likeliest classes of the columns of each row."""
    import torch

    layout: Any = network.layout
    letters = network.model.config.letters
    best_RS = layout.scores(network.model, batch.plan).float().log_softmax(-1).max(-1)
    answers = []
    for class_S, logp_S in zip(best_RS.indices, best_RS.values, strict=True):
        found = torch.unique_consecutive(class_S).tolist()
        text = "".join(letters[each - 1] for each in found if each != BLANK)
        answers.append({"text": text, "probability": float(logp_S.sum().exp())})
    return answers
