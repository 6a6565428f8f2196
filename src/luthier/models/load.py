"""Loading of networks from Hugging Face folders with safetensors."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.data.tree import build_tree
from luthier.errors import CorruptFile, RecipeError, UnknownModel
from luthier.models.catalog import CatalogEntry
from luthier.models.config_errors import DOES_NOT_RUN, bounded_modules, reject_configuration
from luthier.models.folder import ModelFolder, for_head, import_transformers
from luthier.models.formats.external import check_complete, weight_files
from luthier.models.formats.tensors import cast_stored, load_tensors, tensor_headers
from luthier.models.networks import classic as nets
from luthier.models.networks.convolutions import fix_convolutions
from luthier.models.networks.head_forward import classifier_input, media_scores
from luthier.models.networks.heads import (
    CAUSAL_LM,
    Head,
    auto_class,
    decoder_of,
    frozen_parts,
    head_kind,
    head_modules,
    head_weights,
    is_inside,
    set_head_kind,
    set_new_weights,
    start_bias,
)
from luthier.models.networks.layouts import (
    DualEncoder,
    ImageColumns,
    ImageEncoderDecoder,
    Rectangle,
)
from luthier.models.networks.modalities import (
    input_shape,
    media_config,
    media_inputs,
    reads_images_in_text,
    text_config,
)
from luthier.models.networks.network import Network
from luthier.models.networks.probe import (
    UNSUPPORTED,
    check_finite,
    probed_network,
    refusal,
    relative_error,
)
from luthier.models.networks.vision_language import text_network, trial_row
from luthier.models.text_part import NAMES as TEXT_PART_NAMES
from luthier.types import Example, IntArray


def catalogue_config(entry: CatalogEntry, head: Head) -> Any:
    """Return the configuration of a catalogue model, without download."""
    from transformers import AutoConfig

    fields = dict(entry.config)
    nets.register(str(fields["model_type"]))
    return for_head(AutoConfig.for_model(fields.pop("model_type"), **fields), head)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the widest data type of the weights in ``folder``."""
    kinds = {
        kind
        for path in weight_files(folder)
        for name, (kind, _) in tensor_headers(path).items()
        if not name.endswith("_scale_inv")  # FP8 weights have float32 scales
    }
    # Norms may be float32 next to weights with lower precision; no weight may lose precision.
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        if name in kinds:
            return dtype
    return torch.float32


_CONSTRUCTING = threading.Lock()
# transformers patches PreTrainedModel.tie_weights globally while loading: a network created in
# another thread meanwhile would get an untied output layer.


def sketch(config: Any, head: Head) -> nn.Module:
    """Construct the network of ``config`` without numbers, on the meta device.

    Raises:
        UnknownModel: for a configuration that describes no network.
        RecipeError: for a family that fails the comparison with transformers.
    """
    with reject_configuration(UnknownModel, DOES_NOT_RUN.format(config.model_type)):
        kind = auto_class(config, head.kind)
        with _CONSTRUCTING, bounded_modules(), torch.device("meta"):
            model: nn.Module = kind.from_config(config, trust_remote_code=False)
        model = text_network(model) if reads_images_in_text(config) else model
        set_head_kind(model, head.kind)
    reason, tasks = UNSUPPORTED.get(config.model_type, ("", ()))
    if reason and head.kind in (tasks or (head.kind,)):
        raise refusal(model, reason)
    return model


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    head: Head = CAUSAL_LM,
    opened: ModelFolder | None = None,
) -> nn.Module:
    """Load a transformers network with the given head and its original attention.

    A head that is missing in the folder, or has other classes, gets random weights. Other missing
    weights are an error.

    Args:
        opened: The parsed ``folder``, if available.
    """
    from safetensors import SafetensorError

    import_transformers()
    from transformers.utils import logging

    opened = opened or ModelFolder(folder)
    config = opened.config(head)
    kind = config.model_type
    logging.disable_progress_bar()
    quiet = logging.get_verbosity()
    message = f"Cannot load the network in {folder} ({kind})"
    try:
        logging.set_verbosity_error()  # transformers reports a new head as a defect
        with _CONSTRUCTING, reject_configuration(UnknownModel, message):
            found: Any = auto_class(config, head.kind).from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                # Unpickling can run code.
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # A head with other classes is drawn anew; all other mismatches are rejected below.
                ignore_mismatched_sizes=True,
                key_mapping=TEXT_PART_NAMES if opened.uses_text_part else None,
            )
        model, loaded = found
        if opened.uses_text_part or opened.quantization:
            # transformers would save the names of the whole model, or of the quantized weights.
            model._weight_conversions = None
        if opened.quantization:
            # transformers leaves the other weights of FP8 files in their own type.
            cast_stored(model, dtype)
    except SafetensorError as error:
        raise CorruptFile(f"Cannot read the weights in {folder}: {error}") from error
    finally:
        logging.set_verbosity(quiet)
    if reads_images_in_text(config):
        model = text_network(model.to(device), opened.images)
    set_head_kind(model, head.kind)
    # Text embeddings do not use the pooler. Image embeddings would, so an untrained pooler is removed.
    unused = {n for n in loaded["missing_keys"] if head.kind == "embedding" and "pooler." in n}
    if unused and media_config(config) is not None and text_config(config) is None:
        model.base_model.pooler = None
    other = {name for name, *_ in loaded["mismatched_keys"]}
    if head.letters:
        known = other & head_weights(model)
        _restore_letters(model, folder, known)
        other -= known
    absent = set(loaded["missing_keys"]) | other
    # transformers would initialize missing weights with only a warning.
    check_complete(absent - _head_names(model) - unused, f"{folder} ({kind})")
    _check_finite(model, folder)
    start_bias(model, head.bias, absent)
    new = absent & head_weights(model)
    set_new_weights(model, new)
    # transformers keeps loaded weights in float32, and creates a new head in `dtype`.
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    for name in new:
        if kept & {*name.split(".")}:
            weight = model.get_parameter(name)
            weight.data = weight.data.float()
    on_device: nn.Module = model.to(device)
    return on_device


@torch.no_grad()
def _restore_letters(model: nn.Module, folder: Path, names: Collection[str]) -> None:
    """Copy the stored scores of known letters into a head with new letters behind the known ones."""
    for path in weight_files(folder) if names else ():
        for name, stored in load_tensors(path).items():
            if name in names:
                model.get_parameter(name)[: len(stored)] = stored


@torch.no_grad()
def _check_finite(model: nn.Module, folder: Path) -> None:
    """Reject weights with nan or inf, which would make every result nan."""
    statistics = (each for each in model.named_buffers() if "running_" in each[0])
    for name, tensor in (*model.named_parameters(), *statistics):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # aminmax propagates nan, in one pass: a tenth of the time of isfinite().
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CorruptFile(
                f"{name} in {folder} contains nan or inf: the file is damaged, or the "
                "training diverged. Use an earlier checkpoint.",
                rule="weights.not_finite",
            )


def _head_names(model: nn.Module) -> set[str]:
    """Return the names of weights that a folder with a different or no head lacks."""
    heads, prefix = head_modules(model), getattr(model, "base_model_prefix", "")
    named = dict(model.named_parameters(remove_duplicate=False))
    return {
        name
        for name in named
        if is_inside(name, heads) or (heads and not is_inside(name, (prefix, *frozen_parts(model))))
    }


def as_network(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Network:
    """Attach the layout to a transformers model, and compare results with the model's own forward."""
    kind = model.config.model_type  # type: ignore[union-attr]
    fix_convolutions(model)
    if all(weight.dtype == torch.float32 for weight in model.parameters()):
        dtype = torch.float32  # such as statistics, whose precision bfloat16 would lose
    with reject_configuration(UnknownModel, DOES_NOT_RUN.format(kind)):
        return _checked_network(model, device, dtype)


def _checked_network(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Network:
    if media_config(model.config) is not None:
        # Measured on a CPU: convolutions are a quarter faster with channels_last.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = Network(model, device, dtype, is_bidirectional=text_config(model.config) is None)
        freeze_statistics(model)
        model.eval()
        if isinstance(network.layout, ImageEncoderDecoder):
            _check_image_to_text(network)
        elif isinstance(network.layout, ImageColumns):
            _check_columns(network)
        elif isinstance(network.layout, DualEncoder):
            _check_dual_encoder(network)
        elif head_kind(model) == "sequence_classification":
            _check_classifier(network)
        return network
    trial = trial_row(model)
    network = probed_network(model, device, dtype)
    if trial is not None:
        _check_image_tokens(network, *trial)
    return network


@torch.no_grad()
def _check_image_tokens(network: Network, ids_T: IntArray, own_TV: torch.Tensor) -> None:
    """Compare the scores of tokens of a row with an image with the network's own forward."""
    row = Example(ids_T, np.zeros(len(ids_T), np.float32), 0)
    batch = network.batch(build_tree([row], share=network.shares), prefix=False)
    hidden_TH = network.hidden(batch, torch.from_numpy(batch.tree.node_M).to(network.device))
    _compare(network, network.logits(hidden_TH).float(), own_TV)


@torch.no_grad()
def _check_classifier(network: Network) -> None:
    """Compare class scores of random images with the network's own forward."""
    model: Any = network.model
    if not hasattr(model, "classifier"):  # SwiftFormer has two heads
        raise refusal(model, "the network has no single classifier")
    pixels = _random_images(network)
    own = model(**media_inputs(model, pixels)).logits.float()
    _compare(network, media_scores(model, classifier_input(model, pixels)).float(), own)


@torch.no_grad()
def _check_image_to_text(network: Network) -> None:
    """Compare the scores of tokens behind random images with the network's own forward."""
    model: Any = network.model
    pixels = _random_images(network)
    ids_RT = torch.arange(8, device=network.device).view(2, 4)
    mask_RT = torch.ones_like(ids_RT)
    none = ids_RT[:0, 0]
    layout: Any = network.layout
    encoded_RSH = layout.encode(model, Rectangle(none, mask_RT, pixels, None))
    decoder: Any = decoder_of(model)
    hidden_RTH = decoder(
        input_ids=ids_RT, attention_mask=mask_RT, encoder_hidden_states=encoded_RSH, use_cache=False
    ).last_hidden_state
    own = model(pixel_values=pixels, decoder_input_ids=ids_RT, use_cache=False).logits.float()
    _compare(network, network.logits(hidden_RTH).float(), own)


@torch.no_grad()
def _check_columns(network: Network) -> None:
    """Compare the probabilities of letters in random lines with the network's own forward."""
    pixels = _random_images(network)
    layout: Any = network.layout
    ours = layout.scores(network.model, pixels).float().softmax(-1)
    _compare(network, ours, network.model(pixels).last_hidden_state.float())


@torch.no_grad()
def check_decoder_input(network: Network) -> None:
    """Compare the decoder input of an encoder-decoder with transformers.

    The labels are the reply without its start token. transformers shifts the labels to get
    the decoder input, which must equal luthier's decoder input in training.

    Raises:
        RecipeError: with the family, if the inputs differ.
    """
    model, chat = network.model, network.chat
    writes = decoder_of(model) is not None and head_kind(model) == "causal_lm"
    if chat is None or chat.decoder is None or not writes:
        return
    chat.decoder.check()
    ids_1T = torch.from_numpy(chat.decoder.ids("a reply", chat.text_tokenizer))[None].to(
        network.device
    )
    source_1S = torch.from_numpy(chat.text_tokenizer.encode_whole("a prompt"))[None].to(
        network.device
    )
    kind = model.config.model_type
    with reject_configuration(UnknownModel, DOES_NOT_RUN.format(kind)):
        expected = model(input_ids=source_1S, labels=ids_1T[:, 1:]).logits.float()
        given = model(input_ids=source_1S, decoder_input_ids=ids_1T[:, :-1]).logits.float()
    if relative_error(given, expected) > 1e-3:
        raise RecipeError(
            f"Networks of type {kind} are not supported yet: transformers shifts the labels "
            f"differently, so the decoder does not start with token {chat.decoder.start_id}. Use a "
            "T5, BART or M2M-100.",
            rule="network.unsupported",
        )


@torch.no_grad()
def _check_dual_encoder(network: Network) -> None:
    """Compare embeddings of random images and text with the network's own forward."""
    model: Any = network.model
    end = model.config.text_config.eos_token_id
    # Texts of different lengths, so that the comparison covers padding.
    ids_RT = torch.tensor([[3, 4, 5, end], [5, 3, end, end]], device=network.device)
    pixels = _random_images(network)
    own = model(pixel_values=pixels, input_ids=ids_RT)
    rows = [
        Example(ids[: 4 - n].cpu().numpy(), np.zeros(4 - n, np.float32), n)
        for n, ids in enumerate(ids_RT)
    ]
    states = network.row_states(network.batch(build_tree(rows, share=False)), "last")
    _compare(
        network, torch.nn.functional.normalize(states.float(), dim=-1), own.text_embeds.float()
    )
    images = model.get_image_features(pixel_values=pixels).pooler_output.float()
    _compare(network, torch.nn.functional.normalize(images, dim=-1), own.image_embeds.float())


def _random_images(network: Network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *input_shape(network.model.config), generator=generator)
    return images.to(network.device, network.dtype)


def _compare(network: Network, ours: torch.Tensor, own: torch.Tensor) -> None:
    """Raise an error if luthier's and the network's own results differ."""
    check_finite(own)
    error = relative_error(ours, own)
    # Written this way, the comparison also rejects nan.
    if not error < (0.1 if network.dtype == torch.bfloat16 else 1e-3):
        raise RecipeError(
            f"Networks of type {network.model.config.model_type} are not supported yet: "
            f"luthier's outputs differ from transformers' (relative error {error:.2g})."
        )


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed statistics, also in training. Gain and bias can train.

    Few images of another domain would spoil the statistics, and results would depend on other rows
    of the micro-batch.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in the mode of evaluation."""
        return super().train(False)


def freeze_statistics(model: nn.Module) -> None:
    """Make each batch norm of ``model`` a :class:`FrozenBatchNorm2d`; names and numbers stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.eval()
