"""Image to text: write what is written on an image, or what it shows (TrOCR, Li et al. 2021,
arXiv:2109.10282).

An encoder reads the image, and a decoder writes its text behind it. The loss is the cross-entropy of
the tokens of the text, the one that ends it included, given the image and the tokens before, averaged
over all tokens of the global batch. On held-out rows the network also writes each text, always taking
the likeliest token, and the metrics say how many characters and words are wrong.

A network of random weights has to find out where on a line to look before it can learn letters, and
stands still until it has. A second loss (``ctc_weight``) helps it: connectionist temporal
classification (Graves et al. 2006) of the encoder's states, column by column, by a linear layer that
is thrown away after training (Watanabe et al. 2017, section II-B; log: docs/log/media.md).

Left out of the paper: its pre-training on pages, its augmentation, and beam search.
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
from luthier.models.heads import Task
from luthier.objectives.base import Objective, RunModels, TrainingDefaults, chat_of
from luthier.objectives.means import MOST_ROW_SCORES
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

CTC_LAYER = "columns_to_letters"
"""Name of the layer that only training has."""
CTC_WEIGHT = 0.5
LENGTH_MARGIN = 1.25
"""How much longer than the longest training text a written one may be."""


class ImageToText(Objective):
    """The text of an image: lines of writing or print, or captions."""

    method: Literal["image_to_text"] = "image_to_text"
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    """Tokens written to an image at most; a quarter more than in the longest text when not given."""

    ctc_weight: float | None = Field(default=None, ge=0, le=100)
    """Weight of CTC on the columns of a line; 0.5 for encoders of lines of random weights, else 0."""

    task: ClassVar[Task] = "image_to_text"
    shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image"})
    measure: ClassVar[str] = "cer"
    allows_augmentation: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=20,
        bases={"image": "small-ocr"},
        min_steps=3_000,  # where to look has to be learned before any letter is
    )

    def bind(self, models: RunModels) -> Self:
        """Reject networks that write nothing; choose the weight of CTC that suits the encoder."""
        chat = models.chat
        if chat.start_id is None or chat.media is None:
            raise RecipeError(
                "objective image_to_text trains a network with an encoder of images and a decoder of "
                "text, and this is none. Use base=small-ocr, or a VisionEncoderDecoder of transformers "
                "such as TrOCR",
                rule="objective.network",
            )
        if models.network is None or self.ctc_weight is not None:
            return super().bind(models)
        encoder = models.network.fields.get("encoder", {})
        columns = encoder.get("model_type") == "line_encoder" and models.learned is None
        return self.model_copy(update={"ctc_weight": CTC_WEIGHT if columns else 0.0})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """How long texts are."""
        if self.max_tokens is not None:
            return self
        texts = (row.caption for row in rows if isinstance(row, CaptionedImage))
        longest = max(len(chat.tokens(text, first=False)) for text in texts)
        return self.model_copy(update={"max_tokens": int(LENGTH_MARGIN * longest) + 1})

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layer that names the letter of each column, if CTC is learned."""
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
        """The image, and the tokens of its text; of an image alone, what the decoder starts from."""
        chat.check_reads(SHAPES[row.shape].reads)
        assert isinstance(row, MediaRow)
        media = chat.media_input(row)
        ids_T = chat.decoder_opening
        if isinstance(row, CaptionedImage):
            ids_T = chat.decoder_ids(row.caption)
        weight_T = (np.arange(len(ids_T)) > 0).astype(np.float32)
        return Example(ids_T, weight_T, index, media=media)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed cross-entropy of the tokens of the texts; in training CTC's beside it."""
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
        """Minus log-probability of the texts, summed over all ways to lay them along the columns."""
        import torch

        from luthier.models.heads import filling_id

        layer = network.model.get_submodule(CTC_LAYER)
        logp_SRV = layer(encoded_RSH.to(layer.weight.dtype)).float().log_softmax(-1).transpose(0, 1)
        texts = [row.ids_T[1:-1] for row in batch.tree.examples]
        columns, rows = logp_SRV.shape[:2]
        found: Tensor = torch.nn.functional.ctc_loss(
            logp_SRV,
            torch.from_numpy(np.concatenate(texts)).to(logp_SRV.device),
            torch.full((rows,), columns),
            torch.tensor([len(text) for text in texts]),
            blank=filling_id(network.model),
            reduction="sum",
            zero_infinity=True,  # a text of more letters than there are columns
        )
        return found

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """The loss, and the error rates of characters (``cer``, which decides) and words (``wer``)."""
        found = super().validation_metrics(network, examples, budget)
        written, wanted = list[str](), list[str]()
        for batch in network.batches(examples, budget):
            written += [answer["text"] for answer in self.predict(network, batch)]
            wanted += [
                chat_of(network).decode(row.ids_T[1:].tolist()) for row in batch.tree.examples
            ]
        pairs = [*zip(written, wanted, strict=True)]
        scores = {"cer": character_errors(pairs), "wer": word_errors(pairs)}
        found |= {name: each.value for name, each in scores.items()}
        found["cer_error"] = scores["cer"].error
        if len(examples) <= MOST_ROW_SCORES:
            found["rows"] = {"cer": scores["cer"].plain()}
        return found

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """For each row in the order of the tree: the text, and how probable the network finds it.

        ``probability`` is that of all its tokens, the end included; of a text that was cut at
        ``max_tokens`` it is that of its beginning, and it has ``"cut": True``.
        """
        from luthier.models.decoding import sample
        from luthier.models.sampling import Sampling

        chat = chat_of(network)
        layout: Any = network.layout
        longest = min(self.max_tokens or network.context, network.context - 1)
        encoded_RSH = layout.encode(network.model, batch.plan)
        found = sample(
            network,
            [np.array([row]) for row in range(len(batch.tree.examples))],
            1,
            Sampling(temperature=0.0, max_tokens=longest),
            stop_ids=chat.stop_ids,
            encoded_RSH=encoded_RSH,
        )
        answers: list[dict[str, Any]] = []
        for (completion,) in found:
            text = chat.decode(completion.ids_T.tolist())
            answers.append({"text": text, "probability": float(np.exp(completion.logp_T.sum()))})
            if not completion.stopped:
                answers[-1]["cut"] = True
        return answers
