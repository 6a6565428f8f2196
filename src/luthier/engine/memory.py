"""Estimates of the memory and disk that a run takes, before anything is loaded for it.

Memory = the process itself + frozen weights + trained weights with their masters, moments and sums
+ activations of one micro-batch + one chunk of logits. It is never less than the plain network takes,
which is loaded first, and again to check what was saved. The constants were fitted on this code's own
runs (``docs/log/estimates.md``); the estimate errs upwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.adaptations import Adaptation
from luthier.errors import DoesNotFit, UnknownModel
from luthier.models.config_errors import DOES_NOT_RUN, refuse_configuration
from luthier.models.heads import Head, frozen_parts
from luthier.models.layers import layer_names
from luthier.models.modalities import (
    context_length,
    input_shape,
    media_config,
    run_media,
    text_config,
)
from luthier.objectives import Objective
from luthier.objectives.base import add_modules

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.modalities import Shape

PROCESS = 480_000_000
"""Resident bytes of Python with PyTorch and transformers loaded."""
LONGEST_WRITTEN = 128
"""Tokens of the text of an image that memory is counted for: some lines."""
MAPS_HELD = 4
"""Maps of the size of the largest that an autoencoder holds at once, as measured with that of Stable
Diffusion (docs/log/media.md)."""
LEAST_ROW = 32
"""Tokens of rows below which nothing useful fits."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run takes: ``fixed``, and ``per_token`` for each token of a micro-batch."""

    fixed: int
    per_token: int
    least: int = 0
    """What loading and checking take, whatever is trained."""

    def beside(self, further: int) -> MemoryEstimate:
        """The same with ``further`` bytes that are held from the first step to the last."""
        return replace(self, fixed=self.fixed + further)

    def peak(self, tokens: int) -> int:
        """Estimated peak in bytes with micro-batches of ``tokens`` tokens."""
        return max(self.least, self.fixed + self.per_token * tokens)


def weight_bytes(model: Any, bytes_per_number: int) -> int:
    """Bytes of a network: weights in the working type, buffers in their own.

    Buffers are what no precision applies to: tables of positions, and weights that are quantized.
    """
    weights = sum(weight.numel() for weight in model.parameters()) * bytes_per_number
    return int(weights + sum(buffer.nbytes for buffer in model.buffers()))


def trained_numbers(model: Any) -> int:
    """How many numbers of a network train."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def optimizer_bytes(trained: int, bytes_per_number: int) -> int:
    """Master, moments, sum of gradients in float32; gradient and best copy in the working type."""
    return trained * (16 + 2 * bytes_per_number)


def sharded_estimate(
    estimate: MemoryEstimate, model: Any, bytes_per_number: int, processes: int
) -> MemoryEstimate:
    """``estimate`` for the first of ``processes`` that share the layers of ``model``.

    Beside its shards it holds two layers whole (the one that runs and the next, which is gathered),
    the gradients of one on their way into shards, and all that trains where it writes a checkpoint.
    """
    layers = [model.get_submodule(name) for name in layer_names(model)]
    numbers: list[int] = [sum(w.numel() for w in layer.parameters()) for layer in layers]
    trained = [trained_numbers(layer) for layer in layers]
    held = sum(numbers) * bytes_per_number + optimizer_bytes(sum(trained), bytes_per_number)
    on_the_way = 2 * max(numbers) * bytes_per_number + 2 * max(trained) * (bytes_per_number + 4)
    checkpoint = sum(trained) * (12 + bytes_per_number)
    return estimate.beside(on_the_way + checkpoint - (held - held // processes))


def estimate_memory(
    model: Any,
    bytes_per_number: int,
    plain: int = 0,
    calibration: int = 0,
    reads: Shape | None = None,
) -> MemoryEstimate:
    """Estimate for a network whose trained weights are marked (it may live on the meta device).

    ``plain`` is what :func:`weight_bytes` gave for it before anything was attached, ``calibration``
    what the adaptation takes beside the network before the optimizer is made, ``reads`` the shape of an
    image or sound as it is read.
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
    hidden = int(config.hidden_size)
    layers = int(config.num_hidden_layers) + int(getattr(config, "num_decoder_layers", None) or 0)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    vocabulary = int(config.vocab_size)
    logits = 128 * vocabulary * (8 + 2 * bytes_per_number)
    activations = layers * (11 * hidden + 4 * inner) * bytes_per_number
    return MemoryEstimate(PROCESS + weights + optimizer + logits, activations, least)


def activation_bytes(model: Any, bytes_per_number: int, reads: Shape | None = None) -> int:
    """Bytes that one image, with the text that is written of it or stands beside it, leaves in the
    network between forward and backward.

    ``reads`` is the shape of an image or sound; the one that the network is made for when not given.
    They are counted on the ``meta`` device, where tensors have sizes and no numbers. What is computed
    on the way is held as well, of the largest layer twice.
    """
    import torch

    sizes: list[int] = []

    def pack(tensor: Any) -> Any:
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
        refuse_configuration(UnknownModel, DOES_NOT_RUN.format(config.model_type)),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        if dropped:
            config.layerdrop = 0.0  # layers that are left out at random take memory in other steps
        try:
            run_media(model.train(), arrays, **texts)
        finally:
            if dropped:
                config.layerdrop = dropped
    return (sum(sizes) + 4 * max(sizes, default=0)) // 2 * bytes_per_number


def preparation_bytes(model: Any, bytes_per_number: int, reads: Shape | None = None) -> int:
    """Bytes that frozen parts hold at most while they make latents of images, and images of latents.

    They keep nothing for a gradient and work on so many pixels at once, whatever the micro-batch: what
    counts is their largest map. 0 for a network without such parts.
    """
    parts = frozen_parts(model)
    if not parts:
        return 0
    import torch

    from luthier.models.layouts import MOST_IMAGES

    shape = reads or input_shape(model.config)
    largest = 0

    def measure(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    inside = (each for name in parts for each in model.get_submodule(name).modules())
    hooks = [each.register_forward_hook(measure) for each in inside]
    try:
        with refuse_configuration(UnknownModel, DOES_NOT_RUN.format(model.config.model_type)):
            model.decode_latents(model.encode_images(torch.empty(1, *shape, device="meta")))
    finally:
        for hook in hooks:
            hook.remove()
    at_once = max(1, min(MOST_IMAGES, model.pixels_at_once // (shape[1] * shape[2])))
    return int(MAPS_HELD * largest * at_once * bytes_per_number)


def disk_needed(
    model: Any, bytes_per_number: int, adaptation: Adaptation, refit: bool = False
) -> int:
    """Bytes of the checkpoints that are there at once and the custom model, with a tenth to spare.

    A training keeps some while it writes the next one, and they stay until the run ends: with a
    ``refit`` those of two trainings.
    """
    from luthier.engine.checkpoints import RETAINED

    trained = trained_numbers(model)
    total = sum(w.numel() for w in model.parameters())
    saved = total if adaptation.stores_network else trained
    checkpoint = trained * (12 + bytes_per_number)
    checkpoints = (2 if refit else 1) * RETAINED + 1
    return int(1.1 * (checkpoints * checkpoint + saved * bytes_per_number)) + 20_000_000


@dataclass(frozen=True)
class TrainingSketch:
    """A network without its numbers, as it will train, and the memory that takes."""

    model: nn.Module
    memory: MemoryEstimate
    adaptation: Adaptation
    """With what was left open and follows from the network."""


def sketch_training(
    config: Any,
    objective: Objective,
    adaptation: Adaptation,
    size: int,
    head: Head | None = None,
    reads: Shape | None = None,
) -> TrainingSketch:
    """The network of ``config`` with the head of ``objective`` and ``adaptation`` attached.

    ``size`` is the bytes of a number in the working type. ``head`` stands in where the objective has
    seen no rows yet. ``reads`` is the shape of an image or sound, where that is not the network's own.

    Raises:
        RefusedInput: where network, objective and adaptation do not go together.
    """
    # Rows are refused by what stands here before torch is imported.
    import torch

    from luthier.models.load import sketch

    model = sketch(config, head or objective.head())
    # Families of several parts have their sizes elsewhere (PaliGemma), or no embedding (HuBERT).
    message = f"networks of type {config.model_type} cannot be trained here yet"
    with refuse_configuration(UnknownModel, message):
        plain = weight_bytes(model, size)
        adaptation = adaptation.bind_network(model)
        with torch.device("meta"):
            adaptation.attach(model)
            add_modules(model, objective.attach(model))
        memory = estimate_memory(model, size, plain, adaptation.calibration_bytes(model), reads)
        start = trained_numbers(model) * size if objective.uses_reference else 0
    return TrainingSketch(model, memory.beside(start), adaptation)


def check_memory(memory: MemoryEstimate, tokens: int, longest: int, available: int) -> None:
    """Refuse a run whose estimated peak is more than what is free.

    ``tokens`` are those of a micro-batch, and ``longest`` those of the longest row, which a micro-batch
    must hold.

    Raises:
        DoesNotFit: with the micro-batch or the rows that fit, if the weights do.
    """
    peak = memory.peak(tokens)
    # The estimate includes what the process has already.
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
        f"free ({max(memory.fixed, memory.least) / 1e9:.1f} GB whatever the batch, "
        f"{memory.per_token * tokens / 1e9:.1f} GB for micro-batches of {tokens} tokens). {advice}"
    )
