"""Writing a model as a directory that other software loads."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from luthier import __version__
from luthier.adaptations import Adaptation
from luthier.adaptations.lora import LoRA
from luthier.adaptations.qlora import QLoRA
from luthier.data.chat import ChatFormat
from luthier.encryption.files import copy_plain, open_folder
from luthier.engine import machine as machines
from luthier.errors import RecipeError, RunConflict
from luthier.files import hashes_of, need_disk, new_folder, write_bytes
from luthier.models.backends import LLAMA_CPP, llama_cpp_library
from luthier.models.gguf import (
    GeneralMetadata,
    check_quantization,
    check_writable,
    file_size,
    write_gguf,
    write_lora,
)
from luthier.models.load import read_config
from luthier.models.manifest import OWN_FILES, ExportRecord, created_now
from luthier.models.modalities import media_inputs
from luthier.models.pipelines import is_pipeline
from luthier.models.save import ADAPTER, read_adapter, save_format, save_network
from luthier.serving.gguf_parity import compare_gguf, largest_divergence
from luthier.serving.ollama import MODELFILE, modelfile
from luthier.store.model_folders import short_name
from luthier.store.models import (
    StoredModel,
    adaptation_of,
    ancestors,
    chat_format,
    check_mergeable,
    check_whole,
    check_writes,
    content_hash,
    load,
    objective_of,
)


def export(stored: StoredModel, target: Path, merged: bool) -> Path:
    """Write ``stored`` to the new folder ``target`` and return it.

    With ``merged``, or for a model that is no adapter, this is a Hugging Face directory whose
    weights are bit for bit those that luthier serves. Without it, an adapter is written in PEFT's
    format, to be put on the base model named in ``adapter_config.json``; one on a pipeline of diffusers
    in the form that ``pipe.load_lora_weights`` reads.

    Raises:
        RecipeError: for an adapter that the form does not hold.
        CorruptFile: where a file is not the one that was stored, or changed meanwhile.
        RunConflict: where something is at ``target``.
    """
    if stored.parent is not None and stored.parent.parent is not None and not merged:
        raise RecipeError(
            f"{stored.id} is an adapter on the adapter {stored.parent.id}, and PEFT does not put one "
            "on another; use --merged"
        )
    target = _new_target(target)
    with _new_folder(target, stored) as fresh:
        if stored.parent is None:
            _copy(stored.folder, fresh)
        elif merged:
            check_mergeable(stored, "--merged writes nothing else")
            machine = machines.choose_machine()
            model = load(stored, machine.dtype, machine.device)
            save_network(model, chat_format(stored), fresh)
        elif is_pipeline(stored.network_folder):
            _write_diffusers_lora(stored, fresh)
        else:
            for name in ("adapter_config.json", ADAPTER):
                copy_plain(stored.folder / name, fresh / name)
            save_format(chat_format(stored), fresh)
    return target


DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"""File of an adapter that diffusers looks for in a folder."""


def _write_diffusers_lora(stored: StoredModel, folder: Path) -> None:
    """Write an adapter on a pipeline as diffusers reads it.

    The scale of the update goes into its second matrix: diffusers takes 1 where a file names none, and
    not all versions read the same name for it.
    """
    lora = _lora_of(stored)
    if not isinstance(lora, LoRA):
        whole = "export the whole pipeline with --merged"
        raise RecipeError(
            f"{lora.method} is no adapter that diffusers has; "
            f"{whole if lora.mergeable else 'it cannot be merged either, so tune with lora'}"
        )
    prefix = lora.stored_name("")
    tensors = {
        name.removeprefix(prefix): tensor * lora.scale if ".lora_B." in name else tensor
        for name, tensor in read_adapter(stored.folder).items()
    }
    save_file(tensors, folder / DIFFUSERS_LORA, metadata={"format": "pt"})


def _lora_of(stored: StoredModel) -> Adaptation:
    """The adaptation of ``stored``, of a quantized base the LoRA on it."""
    adaptation: Adaptation = adaptation_of(stored)
    return adaptation.lora if isinstance(adaptation, QLoRA) else adaptation


def _new_target(target: Path) -> Path:
    """Where to write, which takes the place of nothing but an empty folder.

    A link stays one, and the folder is made where it leads.

    Raises:
        RunConflict: for anything else that is there.
    """
    target = target.expanduser().absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.is_mount():
        raise RunConflict(f"{target} is where a disk is mounted; name a folder inside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunConflict(f"{target} exists already; name a folder that does not, or an empty one")
    return target


@contextmanager
def _new_folder(target: Path, stored: StoredModel) -> Iterator[Path]:
    """As :func:`luthier.files.new_folder`, for files of ``stored`` as they are in its record.

    Raises:
        CorruptFile: where they are not, before or behind the block.
        RunConflict: where something came to be at ``target`` meanwhile.
    """
    check_whole(stored)
    try:
        with new_folder(target, replace=False) as fresh:
            yield fresh
            check_whole(stored)  # it may have been made anew while it was read
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise RunConflict(
            f"something was written to {target} meanwhile; name another one"
        ) from error


def export_gguf(
    stored: StoredModel, target: Path, merged: bool = True, quantization: str | None = None
) -> ExportRecord:
    """Write a model to the new folder ``target`` for llama.cpp, with a Modelfile for Ollama beside it.

    The weights are those that luthier serves, in the type that ``quantization`` names (f16 when not
    given), with tokenizer, chat template and stop tokens in the same file. With ``merged`` false, it
    is a LoRA adapter alone, in float32, for the GGUF file of its base. Where llama.cpp is installed it
    has loaded the file before the folder is there, and its answers were compared with the model's:
    what is returned says how near they are.

    Raises:
        RecipeError: for a model that llama.cpp cannot run, or that answers otherwise there.
        RunConflict: where something is at ``target``.
    """
    target = _new_target(target)
    if not merged and quantization is not None:
        raise RecipeError(
            "an adapter is written in float32: give a type of weights to its base, or export it merged"
        )
    kind = check_quantization(quantization or "f16")
    check_writes(stored, "and GGUF files are of models that write text")
    config = read_config(stored.network_folder, objective_of(stored).head())
    check_writable(config.model_type, stored.id)
    chat = chat_format(stored)
    if merged:
        check_mergeable(stored, "a GGUF file holds nothing else")
        machine = machines.choose_machine()
        network: Any = load(stored, machine.dtype, torch.device("cpu"))
        need_disk(target, file_size(network, kind), f"writing {stored.id}")
        file, adapter = f"{_file_name(stored)}-{kind.upper()}.gguf", None
    else:
        lora, parent = _gguf_lora(stored)
        file = f"{_file_name(parent)}-{kind.upper()}.gguf"
        adapter = f"{_file_name(stored)}-F32-LoRA.gguf"
    parity = None
    with _new_folder(target, stored) as fresh:
        if adapter is None:
            write_gguf(network, chat, fresh / file, kind, _general_metadata(stored))
            if llama_cpp_library() is not None:
                parity = compare_gguf(fresh / file, network.float(), chat, kind)
        else:
            tensors = read_adapter(stored.folder)
            write_lora(tensors, lora.scale, config, fresh / adapter, _general_metadata(stored))
            if llama_cpp_library() is not None:
                base, cpu = fresh / "base.gguf", torch.device("cpu")
                whole = load(parent, torch.float32, cpu)
                need_disk(target, file_size(whole, "f32"), f"trying {stored.id} on its base")
                write_gguf(whole, chat, base, "f32")
                network = load(stored, torch.float32, cpu)
                parity = compare_gguf(base, network, chat, "f32", fresh / adapter)
                base.unlink()
        write_bytes(fresh / MODELFILE, modelfile(chat, file, adapter).encode())
        weights = kind if merged else "f32"
        return ExportRecord(
            format="gguf",
            quantization=weights,
            is_adapter=not merged,
            created=created_now(),
            luthier=__version__,
            files=hashes_of(fresh),
            compared_in=None if parity is None else f"llama.cpp ({LLAMA_CPP} {version(LLAMA_CPP)})",
            tolerance=largest_divergence(weights),
            tokens=parity,
        )


def _gguf_lora(stored: StoredModel) -> tuple[LoRA, StoredModel]:
    """The adaptation of an adapter that llama.cpp puts on its base, and the base.

    Raises:
        RecipeError: for whatever is no plain LoRA on a base model.
    """
    if stored.parent is None:
        raise RecipeError(f"{stored.id} is no adapter but a whole network; export it merged")
    if stored.parent.parent is not None:
        raise RecipeError(
            f"{stored.id} is an adapter on the adapter {stored.parent.id}; export it merged"
        )
    lora = _lora_of(stored)
    if not isinstance(lora, LoRA) or lora.dora:
        raise RecipeError(
            f"{stored.id} was tuned with {'dora' if isinstance(lora, LoRA) else lora.method}, and "
            "llama.cpp puts adapters of plain LoRA alone on a network; export it merged"
        )
    return lora, stored.parent


def _file_name(stored: StoredModel) -> str:
    """The id of a model as a part of the name of a file."""
    base, _, name = stored.id.partition(":")
    return "-".join(part for part in (short_name(base), name) if part)


def _general_metadata(stored: StoredModel) -> GeneralMetadata:
    known = [stored, *(each for each in ancestors(stored) if isinstance(each, StoredModel))]
    licences = [each.manifest.licence for each in known if each.manifest.licence]
    return GeneralMetadata(
        name=stored.id,
        base=stored.root if stored.root != stored.id else None,
        licence=licences[0] if licences else None,
        sha256=content_hash(stored),
    )


ONNX_FILE = "model.onnx"
ONNX_ERROR = 1e-3
"""Largest difference of a score, beside the largest score, from what PyTorch gives."""


@torch.no_grad()
def export_onnx(stored: StoredModel, target: Path) -> ExportRecord:
    """Write a classifier to the new folder ``target`` for ONNX Runtime; what it is and how near.

    ``model.onnx`` takes ``pixel_values`` ``[batch, C, H, W]``, or ``input_ids`` and ``attention_mask``
    ``[batch, tokens]``, and gives ``logits`` ``[batch, classes]``, in float32. Beside it lie the
    configuration, with the names of the classes, and the tokenizer or how images are read. Before
    the folder is there, ONNX Runtime has answered rows of other sizes than those it was traced with,
    and its answers were compared with PyTorch's.

    Raises:
        RecipeError: for a model that is no classifier, that cannot be traced, or that answers otherwise
            in ONNX Runtime; or where the packages are not installed.
        RunConflict: where something is at ``target``.
    """
    target = _new_target(target)
    for package in ("onnx", "onnxscript", "onnxruntime"):  # before what takes long
        if find_spec(package) is None:
            raise RecipeError(
                f"writing for ONNX needs the package {package}: pip install 'luthier[onnx]'"
            )
    if objective_of(stored).task != "sequence_classification":
        raise RecipeError(f"{stored.id} is no classifier; only classifiers are written for ONNX")
    check_mergeable(stored, "an ONNX file holds nothing else")
    model: Any = load(stored, torch.float32, torch.device("cpu"))
    model.eval()
    chat = chat_format(stored)
    if chat.media is None and model.config.pad_token_id is None:
        raise RecipeError(
            f"{stored.id} has no padding token, so it cannot read texts of several lengths at once"
        )
    traced, other = (_onnx_inputs(model, chat, rows) for rows in (2, 3))
    with _new_folder(target, stored) as fresh:
        _trace(model, traced, fresh / ONNX_FILE, stored.id)
        error = _compare(model, other, fresh / ONNX_FILE)
        if not error <= ONNX_ERROR:
            raise RecipeError(f"ONNX Runtime answers otherwise: scores differ by up to {error:.2g}")
        model.config.save_pretrained(fresh)
        save_format(chat, fresh)
        return ExportRecord(
            format="onnx",
            created=created_now(),
            luthier=__version__,
            files=hashes_of(fresh),
            compared_in=f"ONNX Runtime {version('onnxruntime')}",
            tolerance=ONNX_ERROR,
            score_error=error,
        )


def _onnx_inputs(model: Any, chat: ChatFormat, rows: int) -> dict[str, Tensor]:
    """Random images, or random tokens of two lengths, ``rows`` of them."""
    generator = torch.Generator().manual_seed(rows)
    if chat.media is not None:
        return media_inputs(model, torch.randn(rows, *chat.media.shape, generator=generator))
    tokens = 8 * rows
    ids_RT = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    mask_RT = torch.ones_like(ids_RT)
    ids_RT[0, 5:], mask_RT[0, 5:] = model.config.pad_token_id, 0
    return {"input_ids": ids_RT, "attention_mask": mask_RT}


class _Logits(torch.nn.Module):
    """A network that takes tensors by their place and gives one."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Scores ``[R, C]``."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _trace(model: Any, inputs: dict[str, Tensor], file: Path, name: str) -> None:
    import logging
    import warnings

    axes = {0: "batch", 1: "tokens"} if "input_ids" in inputs else {0: "batch"}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)  # it names each operator of torchvision, which is not here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(model, [*inputs]).eval(),
                tuple(inputs.values()),
                str(file),
                input_names=[*inputs],
                output_names=["logits"],
                dynamic_shapes=(tuple(axes for _ in inputs),),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0]
        raise RecipeError(f"{name} cannot be traced for ONNX: {reason}") from error
    finally:
        quiet.setLevel(level)


def _compare(model: Any, inputs: dict[str, Tensor], file: Path) -> float:
    """Largest difference of a score between PyTorch and ONNX Runtime, beside the largest score."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
    wanted = model(**inputs).logits
    difference = (torch.from_numpy(scores) - wanted).abs().max()
    return float(difference / wanted.abs().max().clamp_min(1e-6))


def _copy(source: Path, target: Path) -> None:
    """All files of a whole network but luthier's own."""
    for path in source.iterdir():
        if path.name in OWN_FILES or path.stem == "loss":
            continue
        if path.is_dir():
            open_folder(path, target / path.name)
        else:
            copy_plain(path, target / path.name)
