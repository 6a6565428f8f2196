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

Not implemented from the paper: pre-training on pages, augmentation, beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes import SHAPES
from luthier.data.shapes.media import CaptionedImage, MediaRow
from luthier.errors import RecipeError
from luthier.evaluation.transcription import character_errors, word_errors
from luthier.media.tasks import TRANSCRIPTION
from luthier.objectives.base import Objective, RunModels, TrainingDefaults, chat_of
from luthier.objectives.means import MOST_ROW_SCORES
from luthier.tasks import Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

CTC_LAYER = "columns_to_letters"
"""Name of the CTC layer, which exists only in training."""
CTC_WEIGHT = 0.5
LENGTH_MARGIN = 1.25
"""Maximum length of a generated text relative to the longest training text."""


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

    task: ClassVar[Task] = TRANSCRIPTION
    shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    measure: ClassVar[str] = "cer"
    allows_augmentation: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=20,
        bases={"image": "small-ocr"},
        min_steps=3_000,  # the network must learn where to look before any letter
    )

    def bind(self, models: RunModels) -> Self:
        """Reject networks without a text decoder, and choose the weight of CTC for the encoder."""
        chat = models.chat
        if chat.decoder is None or chat.media is None:
            raise RecipeError(
                "image_to_text needs an image encoder with a text decoder. Use base=small-ocr, or a "
                "VisionEncoderDecoder of transformers such as TrOCR",
                rule="objective.network",
            )
        if models.network is None or self.ctc_weight is not None:
            return super().bind(models)
        encoder = models.network.fields.get("encoder", {})
        columns = encoder.get("model_type") == "line_encoder" and models.learned is None
        return self.model_copy(update={"ctc_weight": CTC_WEIGHT if columns else 0.0})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Set the maximum number of tokens from the longest text."""
        if self.max_tokens is not None:
            return self
        texts = (row.caption for row in rows if isinstance(row, CaptionedImage))
        longest = max(len(chat.text_tokenizer.tokens(text, first=False)) for text in texts)
        return self.model_copy(update={"max_tokens": int(LENGTH_MARGIN * longest) + 1})

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
        assert isinstance(row, MediaRow) and chat.decoder is not None
        media = chat.media_input(row)
        ids_T = chat.decoder.opening
        if isinstance(row, CaptionedImage):
            ids_T = chat.decoder.ids(row.caption, chat.text_tokenizer)
        weight_T = (np.arange(len(ids_T)) > 0).astype(np.float32)
        return Example(ids_T, weight_T, index, media=media)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of the text tokens, plus the weighted CTC loss in
        training."""
        from luthier.objectives.logprobs import weighted_nll

        if not (self.ctc_weight and network.model.training):
            return Loss(weighted_nll(network, batch))
        layout: Any = network.layout
        encoded_RSH = layout.encode(network.model, batch.plan)
        batch = replace(batch, plan=replace(batch.plan, encoded_RSH=encoded_RSH))
        nll = weighted_nll(network, batch)
        ctc = self._ctc(network, batch, encoded_RSH)
        metrics = {"cross_entropy": float(nll.detach()), "ctc": float(ctc.detach())}
        return Loss(nll + self.ctc_weight * ctc, metrics)

    def _ctc(self, network: Network, batch: TreeBatch, encoded_RSH: Tensor) -> Tensor:
        """Return the negative log-likelihood of the texts, summed over all alignments to columns."""
        import torch

        from luthier.models.networks.heads import padding_id

        layer = network.model.get_submodule(CTC_LAYER)
        logp_SRV = layer(encoded_RSH.to(layer.weight.dtype)).float().log_softmax(-1).transpose(0, 1)
        texts = [row.ids_T[1:-1] for row in batch.tree.examples]
        columns, rows = logp_SRV.shape[:2]
        loss: Tensor = torch.nn.functional.ctc_loss(
            logp_SRV,
            torch.from_numpy(np.concatenate(texts)).to(logp_SRV.device),
            torch.full((rows,), columns),
            torch.tensor([len(text) for text in texts]),
            blank=padding_id(network.model),
            reduction="sum",
            zero_infinity=True,  # texts with more letters than columns
        )
        return loss

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
                chat_of(network).replies.decode(row.ids_T[1:].tolist())
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

        ``probability`` covers all tokens, including the end token. A text of ``max_tokens`` tokens
        without an end token has ``"cut": True``.
        """
        from luthier.models.decoding.sampler import sample
        from luthier.models.decoding.sampling import Sampling

        chat = chat_of(network)
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
