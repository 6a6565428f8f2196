"""Acceptance tests for imported models.

The server accepts a folder as a model only if

- the files satisfy the rules of :mod:`luthier.models.formats.external`;
- all weights of the network and the model's own tokenizer exist;
- luthier's attention layout reproduces the outputs of transformers, or of PEFT for an adapter;
- a trial request to the inference engine succeeds.

A rejection names the file, the rule and the fix.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.inputs import (
    LONGEST_WINDOW,
    PREPROCESSOR_CONFIG,
    PROCESSOR_CONFIG,
    Media,
    Processor,
    read_processor,
)
from luthier.errors import DoesNotFit, Interrupted, LuthierError, ModelRefused
from luthier.files import folder_size
from luthier.inference.inference import Chat, GenerationRequest, ImageRequest, Prompt
from luthier.library.folders import short_name
from luthier.library.models import StoredModel, load, text_format
from luthier.models.formats.external import (
    ADAPTER_CONFIG,
    CONFIG,
    KNOWN_TEMPLATES,
    MODEL_INDEX,
    ImportedFiles,
    adapter_fields,
    check_configuration,
    check_tokenizer,
    check_weights,
)
from luthier.models.formats.pipelines import is_pipeline, network_folders, tokenizer_folder
from luthier.models.formats.save import ADAPTER, read_adapter, save_format
from luthier.models.manifest import Manifest
from luthier.types import Message

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat, Template
    from luthier.inference.sequential import ModelInput

TEST_TOKENS = 8
"""Number of generated tokens of the trial request."""
MOST_INPUT = 3 << 20
"""Maximum number of input values: an image of 1,024 x 1,024 pixels in three colours."""
_STEPS = 2
"""Denoising steps of the trial image."""
_MAX_PEFT_ERROR = 1e-3
"""Maximum relative difference between logits of PEFT and luthier, in float32."""
_GIB = 1 << 30
_LOADED = 3
"""Bytes of memory for each byte of weights while a model is tried."""
_PROCESS = _GIB // 2
"""Memory of the imported libraries, in bytes."""


@dataclass(frozen=True)
class AcceptedModel:
    """Model after passed acceptance tests."""

    manifest: Manifest
    """Manifest without source, files and versions."""
    parent: StoredModel | None
    """The base model of an adapter."""


def memory_needed(
    folder: Path, chosen: ImportedFiles, find_base: Callable[[str], StoredModel | None]
) -> int:
    """Return the memory of the acceptance tests, in bytes.

    Args:
        folder: folder of the model. Only the configuration is read.
        chosen: files with sizes. The weights need not exist yet.
        find_base: see :func:`accept_adapter`.

    Raises:
        ModelRefused: for an adapter on an unknown base model.
    """
    beside = 0
    if chosen.adapter:
        base = _find_base(adapter_fields(folder), find_base)
        # Once for PEFT, once for inference.
        beside = 2 * folder_size(base.network_folder, ".safetensors")
    return _LOADED * (chosen.weights + beside) + _PROCESS


def accept_network(folder: Path, model_id: str, trusted: bool = False) -> AcceptedModel:
    """Test the Hugging Face model or diffusers pipeline in ``folder``.

    The caller reserves the memory. An image or audio classifier loses its classes and gives
    embeddings. The server approves the chat template of a ``trusted`` model and known templates.
    Other templates never run.

    Raises:
        ModelRefused: if a test fails.
    """
    from luthier.models.config_errors import bounded_memory
    from luthier.models.folder import ModelFolder, import_transformers
    from luthier.models.networks.modalities import text_fields
    from luthier.models.tokenizer import check_vocabulary, load_chat_format, reads_texts

    opened = ModelFolder(folder)

    # These checks run before libraries read the files, because malformed files may crash them.
    for part in network_folders(folder):
        with _in_folder(part.relative_to(folder)):
            check_configuration(part)
            check_weights(part)
    check_tokenizer(tokenizer_folder(folder))
    fix = "Save the image processor or feature extractor of the model into the folder."
    with _translate_errors(PREPROCESSOR_CONFIG, "model.input", fix):
        _check_input(None if opened.uses_text_part else read_processor(folder))
    index, fix = CONFIG, "Choose a network that transformers includes."
    if is_pipeline(folder):
        index, fix = MODEL_INDEX, "Choose a Stable Diffusion 1 or 2, as saved by diffusers."
    with _translate_errors(index, "model.network", fix):
        fields = opened.fields
        import_transformers()
        # A hostile configuration may describe a network of any size.
        with bounded_memory():
            network = opened.description
        context, kind = opened.context, opened.kind
        if kind is None:
            raise ModelRefused(
                CONFIG, "model.task", f"The network is a {network.head.replace('_', ' ')} model.",
                "Import a language model, an encoder, an image or audio network, or a pipeline that "
                "generates images. Train text classifiers with a job.",
            )  # fmt: skip
    if kind == "causal_lm" and opened.images is None:
        # luthier uses the text part of other vision-language models.
        (folder / PREPROCESSOR_CONFIG).unlink(missing_ok=True)
    if opened.uses_text_part:
        (folder / PROCESSOR_CONFIG).unlink(missing_ok=True)
    with_texts, form = reads_texts(folder, opened.processor), None
    approved = False
    if with_texts:
        fix = "Save the model's own tokenizer into the folder."
        with _translate_errors("tokenizer.json", "model.tokenizer", fix):
            chat = load_chat_format(folder, opened)
            approved = _test_format(chat, trusted)
            check_vocabulary(chat, fields.get("text_encoder", fields), "the model")
            if chat.decoder is not None:
                chat.decoder.check()
                form = text_format(chat)
    elif text_fields(fields) is not fields:
        raise ModelRefused(
            "tokenizer.json", "model.tokenizer",
            "The folder has no tokenizer, and the network needs text and images.",
            "Call save_pretrained(folder) with the processor of the model.",
        )  # fmt: skip
    manifest = Manifest(
        id=model_id,
        kind=kind,
        saved="network",
        parameters=network.numbers,
        context=context,
        tokenizer_from=model_id if with_texts else None,
        template_approved=approved,
        format=form,
    )
    checks = _test(StoredModel(model_id, folder, manifest))
    if network.head == "sequence_classification":
        checks["classes"] = "removed: the model returns embeddings"
    return AcceptedModel(manifest.model_copy(update={"checks": checks}), None)


def _check_input(processor: Processor | None) -> None:
    """Reject a processor whose inputs need far more memory than the weights."""
    if processor is not None and (values := math.prod(processor.shape)) > MOST_INPUT:
        shape = " x ".join(f"{length:,}" for length in processor.shape)
        raise LuthierError(
            f"inputs of {shape} have {values:,} values, and the limit is {MOST_INPUT:,}"
        )


def accept_adapter(
    folder: Path,
    model_id: str,
    find_base: Callable[[str], StoredModel | None],
    trusted: bool = False,
) -> AcceptedModel:
    """Test the PEFT adapter in ``folder`` on the named base model.

    ``find_base`` returns a base model of this server by its short name. See :func:`accept_network`.
    """
    import torch

    from luthier.adaptations.peft import lora_of
    from luthier.models.text_part import fit_to_text_part
    from luthier.models.tokenizer import check_vocabulary
    from luthier.objectives import OBJECTIVES

    fields = adapter_fields(folder)
    base = _find_base(fields, find_base)
    check_weights(folder)
    if base.network.uses_text_part:
        fit_to_text_part(folder)
        fields = adapter_fields(folder)
    check_tokenizer(folder)
    head = OBJECTIVES["causal_lm"].model_validate({}).head()
    lora = lora_of(fields, read_adapter(folder), base.network.sketch(head))
    fix = "Save the base model's tokenizer into the folder."
    with _translate_errors("tokenizer.json", "model.tokenizer", fix):
        chat = _adapter_format(folder, base)
        approved = _test_format(chat, trusted)
        check_vocabulary(chat, base.network.fields, "the adapter")
    manifest = Manifest(
        id=model_id,
        kind="causal_lm",
        saved="adapter",
        parent=base.id,
        root=base.root,
        tokenizer_from=model_id,
        template_approved=approved,
        recipe={"base": base.id, "adaptation": lora.model_dump(mode="json")},
        format=text_format(chat),
        adapter_of=_base_name(fields),
    )
    candidate = StoredModel(model_id, folder, manifest, base)
    config = base.network.config(head)
    with _translate_errors(
        ADAPTER, "adapter.weights", "Save the adapter again with PEFT's save_pretrained."
    ):
        expected = _peft_logits(folder, base, int(config.vocab_size))
        ours = load(candidate, torch.float32, torch.device("cpu"))
        error = _difference(ours, expected, int(config.vocab_size))
        # Negated, because a NaN must fail, too.
        if not error < _MAX_PEFT_ERROR:
            raise ModelRefused(
                ADAPTER, "adapter.parity",
                f"On {base.id}, the logits differ from PEFT's (relative error {error:.2g}).",
                "Merge the adapter into its base (merge_and_unload), and import the merged model.",
            )  # fmt: skip
    checks = {"peft": "same numbers as PEFT", "peft_error": error, **_test(candidate)}
    return AcceptedModel(manifest.model_copy(update={"checks": checks}), base)


def _find_base(
    fields: Mapping[str, Any], find_base: Callable[[str], StoredModel | None]
) -> StoredModel:
    """Return the base model of an adapter."""
    named = _base_name(fields)
    base = find_base(short_name(named)) if named else None
    if base is None or base.kind != "causal_lm":
        raise ModelRefused(
            ADAPTER_CONFIG, "adapter.base",
            f"The adapter belongs to {named[:200]!r}, which is not a base model of this server.",
            "Merge the adapter into its base (merge_and_unload), and import the merged model.",
        )  # fmt: skip
    return base


def _base_name(fields: Mapping[str, Any]) -> str:
    return str(fields.get("base_model_name_or_path") or "")


def _test(candidate: StoredModel) -> dict[str, Any]:
    """Load the model for inference, compare the layout with transformers, and run a trial request."""
    with _translate_errors(
        "*.safetensors", "model.load", "Save the whole model again with save_pretrained."
    ):
        return (
            _test_generation(candidate)
            if candidate.kind == "causal_lm"
            else _test_serial(candidate)
        )


def _test_generation(candidate: StoredModel) -> dict[str, Any]:
    from luthier.engine.machine import available_memory
    from luthier.inference.decoder import Decoder
    from luthier.inference.memory import CacheBudget

    # Decoder.open compares the layout with the network's own forward pass.
    decoder = Decoder.open(candidate, CacheBudget(max(_GIB // 4, available_memory() // 4)))
    try:
        prompt: Prompt = Chat((Message("user", "Hello."),))
        if not candidate.manifest.template_approved:
            prompt = "Hello."
        request = GenerationRequest(prompt, max_tokens=TEST_TOKENS, temperature=0.0)
        stream = decoder.submit(request)
        stream.results()
        read = stream.prompt_tokens
    finally:
        decoder.close()
    return {"layout": "same numbers as transformers", "answered": True, "prompt_tokens": read}


def _test_serial(candidate: StoredModel) -> dict[str, Any]:
    """Run an encoder on a trial input, or sample an image."""
    from luthier.inference.batcher import Work
    from luthier.inference.sequential import SerialModel

    model = SerialModel.open(candidate)
    try:
        if model.makes_images:
            request = (
                ImageRequest(steps=_STEPS) if candidate.kind == "denoising" else ImageRequest()
            )
            with np.errstate(invalid="raise"):  # NaN would become a pixel value
                (image,) = model.sample(request, 0, Work(), lambda count: None)
            return {"made": "an image", "pixels": list(image.pixels.shape[:2])}
        examples, _ = model.inputs([_sample_input(model.reads)])
        (answer,) = model.predict(examples, None, Work())
    finally:
        model.close()
    if "embedding" not in answer:
        return {"answered": True}
    if not np.isfinite(answer["embedding"]).all():
        raise LuthierError("the embedding has values that are not finite")
    same = {"layout": "same numbers as transformers"} if candidate.kind == "encoder" else {}
    return {**same, "dimensions": len(answer["embedding"])}


def _sample_input(kind: str) -> ModelInput:
    """Return a trial input of the given kind."""
    if kind == "text":
        return "Hello."
    values = np.sin(np.linspace(0, 440 * 2 * np.pi, 16_000))  # one second of 440 Hz
    if kind == "window":
        return Media("window", "a curve", array=values[:LONGEST_WINDOW].astype(np.float32))
    stream = io.BytesIO()
    if kind == "audio":
        with wave.open(stream, "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes((values * 20_000).astype("<i2").tobytes())
        return Media("audio", "a tone", data=stream.getvalue())
    from PIL import Image

    gradient = np.add.outer(np.arange(128), np.arange(128)).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(stream, format="PNG")
    return Media("image", "a gradient", data=stream.getvalue())


def _adapter_format(folder: Path, base: StoredModel) -> ChatFormat:
    """Return the chat format of an adapter, and save the base's tokenizer if the adapter has none."""
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.tokenizer import load_tokenizer

    template: Template = "auto"
    chat = base.chat
    if not (folder / "tokenizer_config.json").is_file():
        save_format(chat, folder)
        template = chat.template.kind
    tokenizer = load_tokenizer(folder)
    return ChatFormat.of(tokenizer, template, chat.stop_ids, chat.decoder, sentence=chat.sentence)


def _test_format(chat: ChatFormat, trusted: bool) -> bool:
    """Encode a first text, and render an approved template; return whether the template is approved."""
    chat.text_tokenizer.encode_whole("Hello.")
    approved = trusted or not chat.template.sha256 or chat.template.sha256 in KNOWN_TEMPLATES
    if approved and chat.template.kind == "chat":
        fix = "Save the tokenizer with the chat template that the model was trained with, or with none."
        with _translate_errors("chat_template", "model.template", fix):
            chat.encode_prompt([Message("user", "Hello.")])
    return approved


def _peft_logits(folder: Path, base: StoredModel, vocabulary: int) -> Tensor:
    import torch
    from peft import PeftModel

    network: Any = load(base, torch.float32, torch.device("cpu"))
    adapted: Any = PeftModel.from_pretrained(network, str(folder))
    return _logits(adapted, vocabulary)


def _difference(network: Any, expected: Tensor, vocabulary: int) -> float:
    return float((_logits(network, vocabulary) - expected).norm() / expected.norm())


def _logits(network: Any, vocabulary: int) -> Tensor:
    """Return logits ``[1, 16, V]`` of a fixed random sequence of tokens."""
    import torch

    ids_1T = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = network.eval()(input_ids=ids_1T).logits
    return found


@contextmanager
def _in_folder(part: Path) -> Iterator[None]:
    """Name files of a part of a pipeline as they are seen from the whole."""
    try:
        yield
    except ModelRefused as refused:
        why = refused.problem
        place = (part / why.file).as_posix()
        raise ModelRefused(place, why.rule, why.message, why.advice) from refused


@contextmanager
def _translate_errors(file: str, rule: str, fix: str) -> Iterator[None]:
    """Translate every error of the block into :class:`ModelRefused`.

    Libraries raise exceptions of any type for malformed files.
    """
    try:
        yield
    except (ModelRefused, DoesNotFit, Interrupted):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
        raise ModelRefused(file, rule, f"{text.strip()[:1000].rstrip('.')}.", fix) from error
