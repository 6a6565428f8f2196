"""Model folders in Hugging Face or diffusers format.

:class:`ModelFolder` parses each file at first use. Callers pass the object on instead of the path,
so no file is parsed twice.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.conversations.image_tokens import ImageTokens
from luthier.data.inputs import MOST_PIXELS, Processor, read_processor
from luthier.errors import ModelRefused, RecipeError, UnknownModel
from luthier.files import read_json
from luthier.models.base_kinds import kind_of_family
from luthier.models.config_errors import reject_configuration
from luthier.models.formats.external import (
    check_layers,
    check_quantization,
    check_sizes,
    check_weights,
    read_network_fields,
)
from luthier.models.formats.pipelines import (
    MODEL_TYPE,
    is_pipeline,
    network_folders,
    part_classes,
    pipeline_processor,
    read_pipeline,
)
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import STEPLESS, Head, HeadKind, has_masks, head_kind_in
from luthier.models.networks.modalities import (
    context_length,
    input_shape,
    is_ctc_recognizer,
    media_config,
    text_fields,
    text_part_config,
    uses_text_part,
)

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CONTEXT = 2048
"""Context of networks without any limit, such as Mamba, in tokens: the length of their training."""
_HEADS_LEFT_OUT: tuple[HeadKind, ...] = (
    "masked_lm", "bidirectional_lm", "sequence_classification", "token_classification",
    "question_answering",
)  # fmt: skip
"""Heads that depend on the training task, or that few folders of the family contain."""


@dataclass(frozen=True)
class NetworkDescription:
    """Properties of the network that a configuration describes."""

    head: HeadKind
    """Head of the model class in the configuration."""
    numbers: int
    """Number of weights; without the head for text encoders and classifiers."""
    flat: bool
    """True if the network supports the flat layout (:mod:`luthier.models.networks.layouts`)."""
    heads: tuple[str, ...]
    """Names of the modules above the backbone."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder with lazily parsed files."""

    path: Path

    @cached_property
    def _file_fields(self) -> dict[str, Any]:
        return (
            read_pipeline(self.path) if is_pipeline(self.path) else read_network_fields(self.path)
        )

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Fields of ``config.json``, of the configuration that a pipeline is converted to, or of the
        text part of a multimodal language model.

        Raises:
            UnknownModel: for a folder without a supported model or without safetensors.
            CorruptFile: for an unreadable file.
        """
        # config.json of a multimodal model may omit fields of the text part, such as the vocabulary.
        fields: dict[str, Any] = (
            self._config.to_dict() if self.uses_text_part else self._file_fields
        )
        return fields

    @property
    def is_stepless(self) -> bool:
        """True for a network without training steps (:data:`STEPLESS`)."""
        return self.fields.get("model_type") in STEPLESS

    @cached_property
    def uses_text_part(self) -> bool:
        """True for a multimodal language model of which luthier loads the text part."""
        return uses_text_part(self._file_fields)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """Settings of quantized weights, ``None`` for plain weights."""
        parts = (self._file_fields, text_fields(self._file_fields))
        return next(filter(None, (part.get("quantization_config") for part in parts)), None)

    @property
    def is_pipeline(self) -> bool:
        """True for a diffusers pipeline."""
        return self._file_fields.get("model_type") == MODEL_TYPE

    @property
    def context(self) -> int:
        """Longest input in tokens."""
        return self.context_and_reason[0]

    @cached_property
    def context_and_reason(self) -> tuple[int, str]:
        """Longest input in tokens, and the source if ``config.json`` has none, otherwise ``""``."""
        with suppress(RecipeError):
            return context_length(self.fields), ""
        with suppress(RecipeError):  # config.json of Falcon relies on the default of its class
            return context_length(self._config.to_dict()), "transformers' default of the family"
        path = self.path / "tokenizer_config.json"
        longest = read_json(path).get("model_max_length") if path.is_file() else None
        # transformers writes 1e30 for a tokenizer without a limit.
        if isinstance(longest, int) and 0 < longest < 1 << 30:
            return longest, "the tokenizer's model_max_length, as config.json has no length"
        return DEFAULT_CONTEXT, "a default, as config.json and the tokenizer have no length"

    @cached_property
    def _stored_processor(self) -> Processor | None:
        return None if self.uses_text_part else read_processor(self.path)

    @property
    def images(self) -> ImageTokens | None:
        """Processor of images in conversations; ``None`` for other networks."""
        found = self._stored_processor
        return found if isinstance(found, ImageTokens) else None

    @cached_property
    def processor(self) -> Processor | None:
        """Image or audio processor, ``None`` for a text network."""
        found = None if self.images else self._stored_processor
        # A pipeline may lack a preprocessor file; its networks determine the processor.
        return (
            pipeline_processor(self.fields) if found is None and is_pipeline(self.path) else found
        )

    def config(self, head: Head) -> Any:
        """Return a new configuration of transformers for the network with ``head``.

        Raises:
            UnknownModel, ModelRefused: see :attr:`description`.
        """
        self.check()
        # for_head changes the configuration, and the cached one serves other heads too.
        return for_head(copy.deepcopy(self._config), head)

    def sketch(self, head: Head) -> nn.Module:
        """Construct the network with ``head`` without numbers, for counting and for early refusals."""
        from luthier.models.load import sketch

        return sketch(self.config(head), head)

    @cached_property
    def _config(self) -> Any:
        import_transformers()
        from transformers import AutoConfig

        fields = self._file_fields
        nets.register(fields.get("model_type"))
        if self.is_pipeline:
            return AutoConfig.for_model(**fields)
        check_layers(fields)
        if self.quantization:
            check_quantization(self.path, self.quantization)
        with reject_configuration(UnknownModel, self._failure):
            # Explicit: without a value, transformers asks on the terminal whether to run the
            # folder's code.
            config = AutoConfig.from_pretrained(str(self.path), trust_remote_code=False)
            config = text_part_config(config) if self.uses_text_part else config
        if self.quantization:
            # Quantized weights cannot be trained or merged.
            config.quantization_config = {**self.quantization, "dequantize": True}
        return config

    @property
    def _failure(self) -> str:
        kind = self._file_fields.get("model_type", "of unknown type")
        return f"Cannot load the network in {self.path} ({kind})"

    def check(self) -> None:
        """Reject an invalid configuration, or a configuration that contradicts the stored weights.

        Raises:
            UnknownModel, ModelRefused: before a network is created, with the full path of the file.
        """
        try:
            _ = self.description
        except ModelRefused as refused:
            why = refused.problem
            raise ModelRefused(
                str(self.path / why.file), why.rule, why.message, why.advice
            ) from refused

    @cached_property
    def description(self) -> NetworkDescription:
        """Properties of the network, created on the meta device.

        Raises:
            UnknownModel: for an invalid configuration.
            ModelRefused: for a network larger than the stored weights.
        """
        check_layers(self._file_fields)
        from luthier.models.load import sketch
        from luthier.models.networks.layouts import is_flat

        import_transformers()
        if self.is_pipeline:
            part_classes()
        with reject_configuration(UnknownModel, self._failure):
            config = copy.deepcopy(self._config)
            kind = head_kind_in(config)
            head = Head("embedding" if kind in _HEADS_LEFT_OUT else kind)
            network = sketch(for_head(config, head), head)
            shape = input_shape(config) if media_config(config) is not None else (1,)
            # Checks at loading run an input of this shape, so the file must not choose any size.
            if min(shape) < 1 or prod(shape) > MOST_PIXELS:
                raise ValueError(f"inputs have the shape {shape}")
            if empty := [name for name, weight in network.named_parameters() if not weight.numel()]:
                raise ValueError(f"{empty[0]} is empty")
        numbers = sum(weight.numel() for weight in network.parameters())
        if not self.quantization:  # quantized files pack several numbers
            check_sizes(numbers, sum(map(check_weights, network_folders(self.path))))
        above = [n for n, child in network.named_children() if child is not network.base_model]
        return NetworkDescription(kind, numbers, is_flat(network), tuple(above))

    @property
    def family_kind(self) -> str | None:
        """Kind of a model family with a single task; ``None`` for other families."""
        return kind_of_family(self.fields.get("model_type"))

    @property
    def kind(self) -> str | None:
        """Kind of base model, ``None`` for other networks, such as text classifiers."""
        if self.family_kind is not None:
            return self.family_kind
        head, processor = self.description.head, self.processor
        if head == "causal_lm":
            return head
        if processor is not None and processor.kind in ("image", "audio"):
            return f"{processor.kind}_encoder"
        # An encoder with one score is a cross-encoder; a decoder with one score, a reward model.
        encodes = processor is None and has_masks(self._config)
        if encodes and head == "sequence_classification" and self._config.num_labels == 1:
            return "reranker"
        return "encoder" if processor is None and head in ("masked_lm", "embedding") else None


def for_head(config: Any, head: Head) -> Any:
    """Return ``config``, set up for ``head``."""
    if head.pooling == "mean" and config.model_type == "bert":
        from luthier.models.networks.classic import mean_pooling_bert

        nets.register(mean_pooling_bert.Config.model_type)
        fields = config.to_dict()
        config = mean_pooling_bert.Config(**{k: v for k, v in fields.items() if k != "model_type"})
    if hasattr(config, "apply_spec_augment"):
        # Wav2Vec2 would draw masks from numpy's global generator, which checkpoints do not store.
        config.apply_spec_augment = False
    if hasattr(config, "rescale_every"):
        # RWKV would divide stored weights by powers of 2 in eval mode, against float16's range.
        config.rescale_every = 0
    if hasattr(config, "encoder") and head.kind in ("embedding", "token_classification"):
        config.is_encoder_decoder = False  # T5Gemma encodes texts without the decoder
    if head.letters and is_ctc_recognizer(config):
        new = (letter for letter in head.letters if letter not in config.letters)
        config.letters += "".join(new)
        config.head_out_channels = 1 + len(config.letters)
    for key, value in head.settings().items():
        setattr(config, key, value)
    return config


_IMPORTING = threading.Lock()
_NETWORKS = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")


def import_transformers(networks: bool = True) -> None:
    """Import the parts of transformers that every network needs; with ``networks=False`` only
    tokenizers.

    transformers imports submodules lazily, and concurrent threads can observe incomplete modules.
    Imports must also precede :func:`~luthier.models.config_errors.bounded_memory`. Tokenizers do
    not need torch.
    """
    with _IMPORTING:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        for name in _NETWORKS if networks else ():
            import_module(name)
