"""VGG with 11 to 19 layers (Simonyan and Zisserman 2015, arXiv:1409.1556), with or without batch
norm.

Convolutions of 3 x 3 in five stages with max pooling, and three linear layers: configurations A, B,
D and E. The last linear layer is the classifier, and its input is the embedding of an image.
Weights have torchvision's names (``features.0.weight``, ``classifier.6.bias``), so published files
load unchanged. As in torchvision, maps are pooled to 7 x 7 before the linear layers, so the image
size may differ. Not implemented: the paper's test crops and scales, and local response
normalization, which brought no gain in the paper.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from luthier.data.inputs import save_processor
from luthier.errors import UnknownModel
from luthier.files import write_json
from luthier.media.networks.image_stages import ImagePreTrainedModel
from luthier.media.processors import ImageProcessor
from luthier.models.formats.external import read_shapes

DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions of each stage, by number of layers with weights."""
_FEATURE = re.compile(r"features\.\d{1,3}\.weight")
_COUNTER = "num_batches_tracked"
"""Counter of batch norms, missing in files of early versions of torch."""
SIDE = 7
"""Height and width of the maps before the linear layers."""


class VGGConfig(PreTrainedConfig):
    """Configuration, by default of VGG-16."""

    model_type = "vgg"

    def __init__(
        self,
        num_layers: int = 16,
        batch_norm: bool = False,
        num_channels: int = 3,
        image_size: int = 224,
        hidden_sizes: tuple[int, ...] = (64, 128, 256, 512, 512),
        intermediate_size: int = 4096,
        dropout_rate: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if num_layers not in DEPTHS:
            raise ValueError(
                f"num_layers must be one of {', '.join(map(str, DEPTHS))}, not {num_layers}"
            )
        self.num_layers = num_layers
        self.batch_norm = batch_norm
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        self.intermediate_size = intermediate_size
        self.dropout_rate = dropout_rate
        super().__init__(**kwargs)


class VGGPreTrainedModel(ImagePreTrainedModel):
    """Base class with the configuration."""

    config_class = VGGConfig
    base_model_prefix = "vgg"


class VGGModel(VGGPreTrainedModel):
    """The network without classifier."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers, inner = list[nn.Module](), config.num_channels
        for count, outer in zip(DEPTHS[config.num_layers], config.hidden_sizes, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(inner, outer, 3, padding=1))
                layers += [nn.BatchNorm2d(outer)] if config.batch_norm else []
                layers.append(nn.ReLU())
                inner = outer
            layers.append(nn.MaxPool2d(2))
        self.features = nn.ModuleList(layers)
        self.fc1 = nn.Linear(inner * SIDE * SIDE, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """Map ``[R, C, H, W]`` to the last maps and the embeddings ``[R, H]``."""
        states = pixel_values
        for layer in self.features:
            states = layer(states)
        flat = F.adaptive_avg_pool2d(states, SIDE).flatten(1)
        pooled = F.relu(self.fc2(self.dropout(F.relu(self.fc1(flat)))))
        return BaseModelOutputWithPoolingAndNoAttention(states, pooled)


class VGGForImageClassification(VGGPreTrainedModel):
    """The network with the last linear layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vgg = VGGModel(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(config.intermediate_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Map ``[R, C, H, W]`` to class scores ``[R, K]``."""
        pooled = self.vgg(pixel_values).pooler_output
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(self.dropout(pooled)))


for _kind, _inside in (("VGGModel", ""), ("VGGForImageClassification", "vgg.")):
    _names = {
        r"^features\.": f"{_inside}features.",
        r"^classifier\.0\.": f"{_inside}fc1.",
        r"^classifier\.3\.": f"{_inside}fc2.",
        r"^classifier\.6\.": "classifier.",
    }
    if not _inside:
        del _names[r"^features\."], _names[r"^classifier\.6\."]
    register_checkpoint_conversion_mapping(
        _kind, [WeightRenaming(old, new) for old, new in _names.items()], overwrite=True
    )


def write_folder(file: Path, folder: Path) -> None:
    """Create a model folder from a file of published weights, with torchvision's ImageNet
    preprocessing.

    Raises:
        UnknownModel: for weights of another network.
        CorruptFile: for an unreadable file.
    """
    from safetensors.torch import load_file, save_file

    shapes = read_shapes(file)
    numbers = sorted(int(name.split(".")[1]) for name in shapes if _FEATURE.fullmatch(name))
    layers = [shapes[f"features.{number}.weight"] for number in numbers]
    convolutions = [shape for shape in layers if len(shape) == 4]
    depth = len(convolutions) + 3
    linear_names = ("classifier.0.weight", "classifier.3.weight", "classifier.6.weight")
    linear = sum(len(shapes.get(name, ())) == 2 for name in linear_names)
    if depth not in DEPTHS or linear < len(linear_names):
        raise UnknownModel(
            f"{file} is not a VGG: found {len(convolutions)} convolutions and {linear} linear layers, "
            f"expected {', '.join(str(each - 3) for each in DEPTHS)} and three",
            rule="model.weights",
        )
    last, sizes = 0, list[int]()
    for count in DEPTHS[depth]:
        last += count
        sizes.append(convolutions[last - 1][0])
    config = VGGConfig(
        depth,
        batch_norm="features.1.running_mean" in shapes,
        num_channels=convolutions[0][1],
        hidden_sizes=tuple(sizes),
        intermediate_size=shapes[linear_names[1]][0],
        num_labels=shapes[linear_names[2]][0],
    )
    with torch.device("meta"):
        model = VGGForImageClassification(config)
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    sent = {_own_name(name): list(shape) for name, shape in shapes.items()}
    counters = sorted(name for name in expected.keys() - sent.keys() if name.endswith(_COUNTER))
    names = (expected.keys() | sent.keys()) - {*counters}
    if mismatched := sorted(name for name in names if expected.get(name) != sent.get(name)):
        raise UnknownModel(
            f"{file} is not a VGG with {depth} layers: {', '.join(mismatched[:3])} differ",
            rule="model.weights",
        )
    if counters:
        zeros = {name.removeprefix("vgg."): torch.tensor(0) for name in counters}
        save_file(load_file(file) | zeros, folder / "model.safetensors", {"format": "pt"})
    else:
        shutil.copyfile(file, folder / "model.safetensors")
    fields = {**config.to_dict(), "architectures": ["VGGForImageClassification"]}
    write_json(folder / "config.json", fields)
    save_processor(ImageProcessor(224, 224, resample="bilinear", shortest_edge=256), folder)


def _own_name(published: str) -> str:
    """Return the name of a weight in :class:`VGGForImageClassification`."""
    for old, new in {"classifier.0.": "vgg.fc1.", "classifier.3.": "vgg.fc2."}.items():
        published = published.replace(old, new)
    return re.sub(r"^features\.", "vgg.features.", published).replace(
        "classifier.6.", "classifier."
    )


Config = VGGConfig
CLASSES = {
    "AutoModel": VGGModel,
    "AutoModelForImageClassification": VGGForImageClassification,
}
"""Model class by automatic class of transformers."""
