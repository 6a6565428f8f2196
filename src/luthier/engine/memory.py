"""Estimates of a run's memory and disk space, before any weight is loaded.

Memory = process + frozen weights + trained weights with masters, moments and gradient sums +
activations of one micro-batch + one chunk of logits. The minimum is the memory of the plain
network, which is loaded first, and again for the parity check. The constants were fitted on
luthier's own runs (``docs/log/estimates.md``); the estimate errs upwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.adaptations import Adaptation
from luthier.errors import DoesNotFit, UnknownModel
from luthier.models.config_errors import DOES_NOT_RUN, reject_configuration
from luthier.models.formats.save import whole_model
from luthier.models.networks.heads import Head, frozen_parts, logit_cap
from luthier.models.networks.layers import layer_names
from luthier.models.networks.modalities import (
    context_length,
    inner_size,
    input_shape,
    media_config,
    run_media,
    text_config,
)
from luthier.objectives import Objective
from luthier.objectives.base import add_modules

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.networks.modalities import Shape

PROCESS = 480_000_000
"""Resident bytes of Python with PyTorch and transformers loaded."""
LONGEST_WRITTEN = 128
"""Assumed length of an image's text, in tokens: some lines."""
MAPS_HELD = 4
"""Feature maps of the largest size in memory at once, measured with Stable Diffusion's autoencoder
(docs/log/media.md)."""
LEAST_ROW = 32
"""Minimum useful row length in tokens."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run takes: ``fixed``, and ``per_token`` for each token of a micro-batch."""

    fixed: int
    per_token: int
    least: int = 0
    """Memory for loading, the parity check and the adaptation's calibration, in bytes."""

    def plus(self, further: int) -> MemoryEstimate:
        """Return the estimate with ``further`` additional bytes for the whole training."""
        return replace(self, fixed=self.fixed + further)

    def peak(self, tokens: int) -> int:
        """Return the estimated peak in bytes with micro-batches of ``tokens`` tokens."""
        return max(self.least, self.fixed + self.per_token * tokens)


def weight_bytes(model: Any, bytes_per_number: int) -> int:
    """Return the bytes of a network: weights in the working type, buffers in the stored type.

    Buffers include position tables and quantized weights, whose type is independent of the
    precision.
    """
    weights = sum(weight.numel() for weight in model.parameters()) * bytes_per_number
    return int(
        weights
        + sum(buffer.nbytes for buffer in model.buffers())
        + vision_bytes(model, bytes_per_number)
    )


def vision_bytes(model: Any, bytes_per_number: int) -> int:
    """Return the bytes of the vision encoder next to a text network; 0 without an encoder.

    Includes the cached features, and the activations of the largest pass, which has no gradient.
    """
    whole = whole_model(model)
    if whole is model:
        return 0
    from luthier.models.networks.vision_language import FEATURE_BYTES, TILES

    own = {id(weight) for weight in model.parameters()}
    weights = sum(w.numel() for w in whole.parameters() if id(w) not in own)
    vision = whole.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    activations = TILES * patches * (4 * vision.hidden_size + vision.intermediate_size)
    return int((weights + activations) * bytes_per_number) + FEATURE_BYTES


def trained_numbers(model: Any) -> int:
    """Return the number of trained weights."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def optimizer_bytes(trained: int, bytes_per_number: int) -> int:
    """Return the bytes of optimizer state and copies for ``trained`` weights.

    float32: master, two moments and the gradient sum. Working type: the gradient and the copy of
    the best weights.
    """
    return trained * (16 + 2 * bytes_per_number)


def sharded_estimate(
    estimate: MemoryEstimate, model: Any, bytes_per_number: int, processes: int
) -> MemoryEstimate:
    """Return the estimate for the first of ``processes`` processes with shards of ``model``.

    In addition to the shards, the process stores two whole layers (the running layer and the
    prefetched next layer), one layer's gradients before sharding, and the masters, moments and best
    weights of all trained weights while writing a checkpoint.
    """
    layers = [model.get_submodule(name) for name in layer_names(model)]
    numbers: list[int] = [sum(w.numel() for w in layer.parameters()) for layer in layers]
    trained = [trained_numbers(layer) for layer in layers]
    held = sum(numbers) * bytes_per_number + optimizer_bytes(sum(trained), bytes_per_number)
    on_the_way = 2 * max(numbers) * bytes_per_number + 2 * max(trained) * (bytes_per_number + 4)
    # float32: master and two moments. Working type: the best weights.
    checkpoint = sum(trained) * (12 + bytes_per_number)
    return estimate.plus(on_the_way + checkpoint - (held - held // processes))


def estimate_memory(
    model: Any,
    bytes_per_number: int,
    plain: int = 0,
    calibration: int = 0,
    reads: Shape | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a network with marked trained weights. The network may be on the meta
    device.

    Args:
        model: the network with head and adaptation.
        bytes_per_number: size of the working type.
        plain: :func:`weight_bytes` before anything was attached.
        calibration: bytes that the adaptation's calibration needs before the optimizer exists.
        reads: shape of an image or audio input.
    """
    trained = trained_numbers(model)
    config = model.config
    optimizer = optimizer_bytes(trained, bytes_per_number)
    weights = weight_bytes(model, bytes_per_number)
    least = PROCESS + max(plain, weights + calibration if calibration else 0)
    if media_config(config) is not None:
        activations = activation_bytes(model, bytes_per_number, reads)
        held = PROCESS + weights + optimizer + preparation_bytes(model, bytes_per_number, reads)
        return MemoryEstimate(held, activations, least)
    # T5Gemma has a configuration for each side, with a number of layers each.
    encoder, config = getattr(config, "encoder", None), text_config(config)
    hidden = int(config.hidden_size)
    layers = int(config.num_hidden_layers) + int(getattr(config, "num_decoder_layers", None) or 0)
    layers += getattr(encoder, "num_hidden_layers", 0) if encoder is not config else 0
    inner = int(inner_size(config) or 4 * hidden)
    vocabulary = int(config.vocab_size)
    # One chunk of logprobs.CHUNK positions: float32 logits and gradient, the slope of capped
    # logits, and two working copies.
    wide = 12 if logit_cap(model) else 8
    logits = 128 * vocabulary * (wide + 2 * bytes_per_number)
    # Saved tensors per token: 11 of width hidden and 4 of width inner in each layer (fitted).
    per_layer = 11 * hidden + 4 * inner
    chosen = getattr(config, "num_experts_per_tok", None)
    if isinstance(chosen, int):
        # Each chosen expert saves 3 tensors of width hidden and 4 of its own width. Without a width
        # of experts, `inner` is the width of experts, and no layer is dense.
        own = getattr(config, "moe_intermediate_size", None)
        per_layer += chosen * (3 * hidden + 4 * (own or inner)) - (0 if own else 4 * inner)
    activations = layers * per_layer * bytes_per_number
    return MemoryEstimate(PROCESS + weights + optimizer + logits, activations, least)


def activation_bytes(model: Any, bytes_per_number: int, reads: Shape | None = None) -> int:
    """Return the bytes of one image or audio input with text, between forward and backward.

    The sizes are counted on the ``meta`` device, where tensors have no data. The run has two
    inputs, so half of the sum counts. Twice the largest tensor of the run is added for temporaries.
    ``reads`` is the input shape; default: the network's own.
    """
    import torch

    sizes: list[int] = []

    def pack(tensor: Any) -> Any:
        # Saved weights are references and need no additional memory.
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    arrays = torch.empty(2, *(reads or input_shape(model.config)), device="meta")
    texts = dict[str, torch.Tensor]()
    if text_config(model.config) is not None:
        longest = min(LONGEST_WRITTEN, context_length(model.config.to_dict()))
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        texts[name] = torch.zeros(2, longest, dtype=torch.int64, device="meta")
    config: Any = model.config
    dropped = getattr(config, "layerdrop", 0.0)
    with (
        reject_configuration(UnknownModel, DOES_NOT_RUN.format(config.model_type)),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        if dropped:
            config.layerdrop = 0.0  # layers skipped in one step need memory in other steps
        try:
            run_media(model.train(), arrays, **texts)
        finally:
            if dropped:
                config.layerdrop = dropped
    return (sum(sizes) + 4 * max(sizes, default=0)) // 2 * bytes_per_number


def preparation_bytes(model: Any, bytes_per_number: int, reads: Shape | None = None) -> int:
    """Return the peak bytes of the frozen latent encoder and decoder; 0 without frozen parts.

    Frozen parts store nothing for a gradient and compute a fixed number of pixels at once.
    Therefore the largest feature map decides, independent of the micro-batch.
    """
    parts = frozen_parts(model)
    if not parts:
        return 0
    import torch

    from luthier.models.networks.layouts import MOST_IMAGES

    shape = reads or input_shape(model.config)
    largest = 0

    def measure(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    inside = (each for name in parts for each in model.get_submodule(name).modules())
    hooks = [each.register_forward_hook(measure) for each in inside]
    try:
        with reject_configuration(UnknownModel, DOES_NOT_RUN.format(model.config.model_type)):
            model.decode_latents(model.encode_images(torch.empty(1, *shape, device="meta")))
    finally:
        for hook in hooks:
            hook.remove()
    at_once = max(1, min(MOST_IMAGES, model.pixels_at_once // (shape[1] * shape[2])))
    return int(MAPS_HELD * largest * at_once * bytes_per_number)


def disk_needed(
    model: Any, bytes_per_number: int, adaptation: Adaptation, refit: bool = False
) -> int:
    """Return the bytes of all simultaneous checkpoints and of the custom model, plus a tenth.

    A training keeps old checkpoints while writing the next, until the run ends. A ``refit`` keeps
    the checkpoints of two trainings.
    """
    from luthier.engine.checkpoints import RETAINED

    trained = trained_numbers(model)
    total = sum(w.numel() for w in model.parameters())
    saved = total if adaptation.stores_network else trained
    # float32: master and two moments. Working type: the best weights.
    checkpoint = trained * (12 + bytes_per_number)
    checkpoints = (2 if refit else 1) * RETAINED + 1
    return int(1.1 * (checkpoints * checkpoint + saved * bytes_per_number)) + 20_000_000


@dataclass(frozen=True)
class TrainingSketch:
    """A network on the meta device as in training, with the memory estimate."""

    model: nn.Module
    memory: MemoryEstimate
    adaptation: Adaptation
    """The adaptation with settings completed from the network."""


def sketch_training(
    config: Any,
    objective: Objective,
    adaptation: Adaptation,
    size: int,
    head: Head | None = None,
    reads: Shape | None = None,
) -> TrainingSketch:
    """Build the network of ``config`` on the meta device with head and adaptation attached.

    Args:
        config: configuration of the network.
        objective: the objective.
        adaptation: the adaptation.
        size: bytes of a number in the working type.
        head: replacement head if the objective has seen no rows.
        reads: shape of an image or audio input; default: the network's own.

    Raises:
        RefusedInput: if network, objective and adaptation are incompatible.
    """
    # Lazy, so that rows can be rejected before torch is imported.
    import torch

    from luthier.models.load import sketch

    model = sketch(config, head or objective.head())
    # Families of several parts have their sizes elsewhere (PaliGemma), or no embedding (HuBERT).
    message = f"networks of type {config.model_type} cannot be trained here yet"
    with reject_configuration(UnknownModel, message):
        plain = weight_bytes(model, size)
        adaptation = adaptation.bind_network(model)
        with torch.device("meta"):
            adaptation.attach(model)
            add_modules(model, objective.attach(model))
        memory = estimate_memory(model, size, plain, adaptation.calibration_bytes(model), reads)
        # The reference model is a second copy of the trained weights (`Network.remember_start`).
        start = trained_numbers(model) * size if objective.uses_reference else 0
    return TrainingSketch(model, memory.plus(start), adaptation)


def check_memory(memory: MemoryEstimate, tokens: int, longest: int, available: int) -> None:
    """Reject a run whose estimated peak exceeds the free memory.

    Args:
        memory: the estimate.
        tokens: tokens per micro-batch.
        longest: tokens of the longest row, which must fit into a micro-batch.
        available: free memory in bytes.

    Raises:
        DoesNotFit: with the micro-batch or row length that fits, if the weights fit.
    """
    peak = memory.peak(tokens)
    # `available` excludes the memory of this process, and the estimate includes it as PROCESS.
    room = available + PROCESS
    if peak <= room:
        return
    fitting = (room - memory.fixed) // max(1, memory.per_token) if memory.least <= room else 0
    if fitting >= min(longest, tokens):
        advice = f"Set `training.micro_batch_tokens={fitting}`"
    elif fitting >= LEAST_ROW:
        advice = f"Use rows of at most {fitting:,} tokens (the longest has {longest:,})"
    else:
        advice = "Use `adaptation=lora` or a smaller base, or a machine with more memory"
    raise DoesNotFit(
        f"this run needs about {peak / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
        f"free ({max(memory.fixed, memory.least) / 1e9:.1f} GB fixed, "
        f"{memory.per_token * tokens / 1e9:.1f} GB for micro-batches of {tokens} tokens). "
        f"{advice}"
    )
