"""A model folder in the form of Hugging Face or diffusers, opened once.

:class:`ModelFolder` parses each file of the folder when a value from the file is first needed. Code
that runs later receives the object, not the path.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.inputs import MOST_PIXELS, Processor, read_processor
from luthier.errors import ModelRefused, UnknownModel
from luthier.models import nets
from luthier.models.base_kinds import kind_of_family
from luthier.models.config_errors import refuse_configuration
from luthier.models.external import (
    check_layers,
    check_sizes,
    check_weights,
    read_network_fields,
)
from luthier.models.heads import Head, Task, task_in
from luthier.models.modalities import context_length, input_shape, media_config
from luthier.models.pipelines import (
    MODEL_TYPE,
    is_pipeline,
    network_folders,
    part_classes,
    pipeline_processor,
    read_pipeline,
)

if TYPE_CHECKING:
    from torch import nn

_HEADS_LEFT_OUT: tuple[Task, ...] = (
    "masked_lm", "bidirectional_lm", "sequence_classification", "token_classification"
)  # fmt: skip
"""Heads that depend on what is learned, or that few folders of the family contain."""


@dataclass(frozen=True)
class NetworkDescription:
    """The network that a configuration describes."""

    task: Task
    """Task of the class that the configuration names."""
    numbers: int
    """Number of weights; of an encoder of texts or a classifier without the head."""
    flat: bool
    """Whether the network takes the flat layout (:mod:`luthier.models.layouts`)."""
    heads: tuple[str, ...]
    """Names of the modules above the backbone."""


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a network, with its parsed files."""

    path: Path

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Fields of ``config.json``, or of the configuration that is made of those of a pipeline.

        Raises:
            UnknownModel: for a folder without a known model, or without safetensors.
            CorruptFile: for a file that cannot be read.
        """
        return (
            read_pipeline(self.path) if is_pipeline(self.path) else read_network_fields(self.path)
        )

    @property
    def is_pipeline(self) -> bool:
        """Whether the folder is a pipeline of diffusers."""
        return self.fields.get("model_type") == MODEL_TYPE

    @property
    def context(self) -> int:
        """Longest input in tokens."""
        return context_length(self.fields)

    @cached_property
    def processor(self) -> Processor | None:
        """Processor of images or sounds; ``None`` for a network that reads texts only."""
        found = read_processor(self.path)
        # A pipeline does not have to name a processor: the processor follows from its networks.
        return (
            pipeline_processor(self.fields) if found is None and is_pipeline(self.path) else found
        )

    def config(self, head: Head) -> Any:
        """Return a new configuration of transformers for the network with ``head``.

        Raises:
            UnknownModel, ModelRefused: see :attr:`description`.
        """
        self.check()
        return for_head(copy.deepcopy(self._config), head)

    def sketch(self, head: Head) -> nn.Module:
        """Construct the network with ``head`` without numbers, for counting and for early refusals."""
        from luthier.models.load import sketch

        return sketch(self.config(head), head)

    @cached_property
    def _config(self) -> Any:
        import_transformers()
        from transformers import AutoConfig

        nets.register(self.fields.get("model_type"))
        if self.is_pipeline:
            return AutoConfig.for_model(**self.fields)
        return AutoConfig.from_pretrained(str(self.path), trust_remote_code=False)

    def check(self) -> None:
        """Refuse a configuration that describes no network, or not the network of the stored weights.

        Raises:
            UnknownModel, ModelRefused: before a network is built, with the full path of the file.
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
        """The network of the configuration, constructed without numbers.

        Raises:
            UnknownModel: for a configuration that describes no network.
            ModelRefused: for a network that is larger than its stored weights.
        """
        check_layers(self.fields)
        from luthier.models.layouts import is_flat
        from luthier.models.load import sketch

        import_transformers()
        if self.is_pipeline:
            part_classes()
        kind = self.fields.get("model_type", "of unknown type")
        message = f"the network in {self.path} ({kind}) cannot be loaded"
        with refuse_configuration(UnknownModel, message):
            config = copy.deepcopy(self._config)
            task = task_in(config)
            head = Head("embedding" if task in _HEADS_LEFT_OUT else task)
            network = sketch(for_head(config, head), head)
            shape = input_shape(config) if media_config(config) is not None else (1,)
            if min(shape) < 1 or prod(shape) > MOST_PIXELS:
                raise ValueError(f"its inputs have the shape {shape}")
            if empty := [name for name, weight in network.named_parameters() if not weight.numel()]:
                raise ValueError(f"{empty[0]} has no numbers")
        numbers = sum(weight.numel() for weight in network.parameters())
        if not self.fields.get("quantization_config"):  # files of few bits pack several numbers
            check_sizes(numbers, sum(map(check_weights, network_folders(self.path))))
        above = [n for n, child in network.named_children() if child is not network.base_model]
        return NetworkDescription(task, numbers, is_flat(network), tuple(above))

    @property
    def family_kind(self) -> str | None:
        """Kind of base model of a family that is made for one task; ``None`` for other families."""
        return kind_of_family(self.fields.get("model_type"))

    @property
    def kind(self) -> str | None:
        """Kind of base model; ``None`` for a network that is none, such as a classifier of texts."""
        if self.family_kind is not None:
            return self.family_kind
        task, processor = self.description.task, self.processor
        if task == "causal_lm":
            return task
        if processor is not None and processor.kind in ("image", "audio"):
            return f"{processor.kind}_encoder"
        return "encoder" if processor is None and task in ("masked_lm", "embedding") else None


def for_head(config: Any, head: Head) -> Any:
    """Return ``config``, set up for ``head``."""
    if head.pooling == "mean" and config.model_type == "bert":
        from luthier.models.nets import mean_pooling_bert

        nets.register(mean_pooling_bert.Config.model_type)
        fields = config.to_dict()
        config = mean_pooling_bert.Config(**{k: v for k, v in fields.items() if k != "model_type"})
    if hasattr(config, "apply_spec_augment"):
        # Wav2Vec2 would draw masks from numpy's own stream, which no checkpoint holds.
        config.apply_spec_augment = False
    for key, value in head.settings().items():
        setattr(config, key, value)
    return config


_IMPORTING = threading.Lock()
_NETWORKS = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")


def import_transformers(networks: bool = True) -> None:
    """Import the parts of transformers that networks of any family need, or tokenizers alone.

    transformers resolves its names when they are first used, and threads that resolve names at the same
    time can get incomplete modules. The imported memory also must not count as that of a network.
    Tokenizers do not need torch.
    """
    with _IMPORTING:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        for name in _NETWORKS if networks else ():
            import_module(name)
