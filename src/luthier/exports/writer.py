"""Writers of safetensors and GGUF exports."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from luthier import __version__
from luthier.adaptations import Adaptation
from luthier.adaptations.lora import LoRA
from luthier.adaptations.peft import target_modules
from luthier.adaptations.qlora import QLoRA
from luthier.engine import machine as machines
from luthier.errors import RecipeError, RunConflict
from luthier.exports.ollama import MODELFILE, modelfile
from luthier.exports.peft_parity import check_peft
from luthier.exports.transformers_parity import check_loads, expected_output
from luthier.files import (
    folder_size,
    hashes_of,
    need_disk,
    new_folder,
    new_target,
    read_json,
    sweep,
    write_bytes,
)
from luthier.inference.gguf_parity import compare_gguf, largest_divergence
from luthier.library.folders import short_name, split_id
from luthier.library.models import (
    StoredModel,
    ancestors,
    check_mergeable,
    check_whole,
    check_writes,
    load,
)
from luthier.models.decoding.backends import LLAMA_CPP, llama_cpp_library
from luthier.models.formats.external import ADAPTER_CONFIG
from luthier.models.formats.gguf import (
    GeneralMetadata,
    check_quantization,
    file_size,
    write_gguf,
    write_lora,
)
from luthier.models.formats.gguf_networks import network_of
from luthier.models.formats.pipelines import network_folders
from luthier.models.formats.save import (
    ADAPTER,
    read_adapter,
    save_format,
    save_network,
    set_padding_token,
    whole_model,
)
from luthier.models.formats.tensors import cast_stored
from luthier.models.load import stored_dtype
from luthier.models.manifest import OWN_FILES, ExportRecord, created_now
from luthier.models.networks.heads import head_kind
from luthier.models.networks.sentence_head import attach_sentence_head, save_sentence_head
from luthier.models.text_part import fit_to_whole

Phase = Literal["merge", "trace", "write", "compare"]
"""A phase of an export. An export has some of the phases, in this order."""
OnProgress = Callable[[Phase, int, int], None]
"""Receives the phase, the finished amount and the total: bytes of ``write``, networks of ``merge``,
prompts or batches of ``compare``."""


def ignore_progress(phase: Phase, done: int, total: int) -> None:
    """Discard the progress."""


PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""Precisions of merged weights by name."""


def merged_dtype(stored: StoredModel, precision: str | None = None) -> torch.dtype:
    """Return the precision of merged weights: ``precision``, or the precision of the base's
    weights."""
    if precision is not None:
        return PRECISIONS[precision]
    return max(map(stored_dtype, network_folders(stored.network_folder)), key=lambda d: d.itemsize)


def export(
    stored: StoredModel,
    target: Path,
    merged: bool,
    on_progress: OnProgress = ignore_progress,
    precision: str | None = None,
) -> Path:
    """Write ``stored`` to the new folder ``target`` and return the folder.

    With ``merged``, or for a model without an adapter, the folder is a Hugging Face directory.
    Without ``merged``, the folder has an adapter in PEFT's format for the base model in
    ``adapter_config.json``. PEFT loads the adapter and the outputs are compared. An adapter on a
    diffusers pipeline is written for ``pipe.load_lora_weights``.

    Args:
        stored: the model.
        target: the new folder.
        merged: whether to merge the adapter.
        on_progress: receives the progress.
        precision: precision of merged weights; by default the precision of the base's weights.

    Raises:
        RecipeError: for an adapter that the format cannot express or that PEFT loads only in part.
        CorruptFile: if a file of the model differs from its record, before or after the export.
        RunConflict: if the folder has files.
    """
    if stored.parent is not None and stored.parent.parent is not None and not merged:
        raise RecipeError(
            f"{stored.id} is an adapter on the adapter {stored.parent.id}. Export with `--merged`",
            rule="export.stacked",
        )
    target = new_target(target)
    with new_export_folder(target, stored) as fresh:
        if merged or stored.parent is None:
            check_mergeable(stored, "a merged export contains merged weights only")
            dtype = merged_dtype(stored, precision)
            # float16 would round away the small updates of an adapter.
            wide = torch.float32 if dtype == torch.float16 else dtype
            device = machines.choose_machine().device
            model: Any = load_merged(stored, wide, device, on_progress)
            whole = whole_model(model)
            cast_stored(whole, dtype)
            set_padding_token(whole, stored.chat)
            expected, kind = expected_output(whole), head_kind(model)
            if stored.parent is None and precision is None:
                with _report_written(folder_size(stored.folder), on_progress):
                    _copy(stored.folder, fresh)
            else:
                size = sum(weight.nbytes for weight in model.parameters())
                with _report_written(size, on_progress):
                    save_network(model, stored.chat, fresh)
            del model, whole  # one network in memory at a time
            if thresholds := getattr(stored.objective, "thresholds", None):
                config = {**read_json(fresh / "config.json"), "thresholds": thresholds}
                write_bytes(
                    fresh / "config.json", json.dumps(config, indent=2, sort_keys=True).encode()
                )
            if expected is not None:
                on_progress("compare", 0, 1)
                check_loads(fresh, stored.id, kind, expected, dtype, device)
                on_progress("compare", 1, 1)
        elif stored.network.is_pipeline:
            _write_diffusers_lora(stored, fresh)
        else:
            for name in (ADAPTER_CONFIG, ADAPTER):
                shutil.copyfile(stored.folder / name, fresh / name)
            save_format(stored.chat, fresh)
            _save_sentence_head(stored, fresh)
            if isinstance(_lora_of(stored), LoRA):
                config = read_json(fresh / ADAPTER_CONFIG)
                if not config.get("target_parameters"):
                    targets = {"target_modules": target_modules(read_adapter(fresh))}
                    text = json.dumps({**config, **targets}, indent=2, sort_keys=True)
                    write_bytes(fresh / ADAPTER_CONFIG, text.encode())
                check_peft(stored, fresh)
            if stored.network.uses_text_part:
                fit_to_whole(fresh, stored.network)
    return target


def load_merged(
    stored: StoredModel, dtype: torch.dtype, device: torch.device, on_progress: OnProgress
) -> torch.nn.Module:
    """Return the network of ``stored`` with all adapters merged, and report the phase ``merge``."""
    lineage = [stored]
    while lineage[-1].parent is not None:
        lineage.append(lineage[-1].parent)
    if len(lineage) == 1:  # a base model has nothing to merge
        return load(stored, dtype, device)
    done, total = 0, len(lineage)

    def count(merged: StoredModel) -> None:
        nonlocal done
        done += 1
        on_progress("merge", done, total)

    on_progress("merge", 0, total)
    return load(stored, dtype, device, on_merged=count)


@contextmanager
def _report_written(total: int, on_progress: OnProgress) -> Iterator[None]:
    """Report the start and the end of writing ``total`` bytes: libraries report no progress in
    between."""
    on_progress("write", 0, total)
    yield
    on_progress("write", total, total)


def _save_sentence_head(stored: StoredModel, folder: Path) -> None:
    """Write the pipeline of a sentence encoder next to the adapter."""
    head = stored.objective.head()
    if head.kind == "embedding":
        network: Any = stored.network.sketch(head)
        attach_sentence_head(network, stored.chat.sentence, stored.network_folder)
        save_sentence_head(network, folder)


DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"""File name that diffusers expects for an adapter."""


def _write_diffusers_lora(stored: StoredModel, folder: Path) -> None:
    """Write an adapter on a pipeline in diffusers' format.

    The second matrix includes the scale of the update: diffusers defaults to a scale of 1, and
    versions of diffusers differ in the name of the scale.
    """
    lora = _lora_of(stored)
    if not isinstance(lora, LoRA):
        fix = "Export with `--merged`" if lora.mergeable else "Tune with lora"
        raise RecipeError(f"diffusers does not support adapters of {lora.method}. {fix}")
    prefix = lora.stored_name("")
    tensors = {
        name.removeprefix(prefix): tensor * lora.scale if ".lora_B." in name else tensor
        for name, tensor in read_adapter(stored.folder).items()
    }
    save_file(tensors, folder / DIFFUSERS_LORA, metadata={"format": "pt"})


def _lora_of(stored: StoredModel) -> Adaptation:
    """Return the adaptation of ``stored``; for QLoRA, the LoRA part."""
    adaptation = stored.adaptation
    return adaptation.lora if isinstance(adaptation, QLoRA) else adaptation


@contextmanager
def new_export_folder(target: Path, stored: StoredModel) -> Iterator[Path]:
    """Create a folder as :func:`luthier.files.new_folder` does, while the files of ``stored`` stay
    intact.

    Raises:
        CorruptFile: if a file of ``stored`` differs from its record, before or after the block.
        RunConflict: if ``target`` receives files during the block.
    """
    check_whole(stored)
    sweep(target.parent, target.name)
    try:
        with new_folder(target, replace=False) as fresh:
            yield fresh
            check_whole(stored)  # another process may have replaced the model meanwhile
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise RunConflict(f"another process wrote to {target}. Choose another folder") from error


def export_gguf(
    stored: StoredModel,
    target: Path,
    merged: bool = True,
    quantization: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ExportRecord:
    """Write a model to the new folder ``target`` for llama.cpp, with a Modelfile for Ollama.

    One file has the served weights, the tokenizer, the chat template and the stop tokens. If
    llama.cpp is installed, llama.cpp loads the file before the folder appears, and the outputs are
    compared with the model's.

    Args:
        stored: the model.
        target: the new folder.
        merged: whether to merge the adapter. Otherwise the file is a LoRA adapter in float32 for
            the GGUF
            file of the base.
        quantization: type of the weights; f16 by default.
        on_progress: receives the progress.

    Returns:
        The record, with the parity if llama.cpp is installed.

    Raises:
        RecipeError: for a model that llama.cpp cannot run, or with different outputs there.
        RunConflict: if the folder has files.
    """
    target = new_target(target)
    if not merged and quantization is not None:
        raise RecipeError(
            "adapters are written in float32. Omit `--quantization`, or export with `--merged`",
            rule="export.precision",
        )
    kind = check_quantization(quantization or "f16")
    check_writes(stored)
    config = stored.network.config(stored.objective.head())
    network_of(config.model_type, stored.id)
    chat = stored.chat
    if merged:
        check_mergeable(stored, "a GGUF file contains merged weights only")
        machine = machines.choose_machine()
        network: Any = load_merged(stored, machine.dtype, torch.device("cpu"), on_progress)
        size = file_size(network, kind)
        need_disk(target, size, f"writing {stored.id}")
        file, adapter = f"{_file_name(stored)}-{kind.upper()}.gguf", None
    else:
        lora, parent = _plain_lora(stored)
        file = f"{_file_name(parent)}-{kind.upper()}.gguf"
        adapter = f"{_file_name(stored)}-F32-LoRA.gguf"
    parity = None

    def on_compared(done: int, total: int) -> None:
        on_progress("compare", done, total)

    with new_export_folder(target, stored) as fresh:
        if adapter is None:
            with _report_written(size, on_progress):
                write_gguf(network, chat, fresh / file, kind, _general_metadata(stored))
            if llama_cpp_library() is not None:
                parity = compare_gguf(fresh / file, network.float(), chat, kind, None, on_compared)
        else:
            tensors = read_adapter(stored.folder)
            write_lora(tensors, lora.scale, config, fresh / adapter, _general_metadata(stored))
            if llama_cpp_library() is not None:
                base, cpu = fresh / "base.gguf", torch.device("cpu")
                whole = load(parent, torch.float32, cpu)
                size = file_size(whole, "f32")
                need_disk(target, size, f"trying {stored.id} on its base")
                with _report_written(size, on_progress):
                    write_gguf(whole, chat, base, "f32")
                network = load_merged(stored, torch.float32, cpu, on_progress)
                parity = compare_gguf(base, network, chat, "f32", fresh / adapter, on_compared)
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


def _plain_lora(stored: StoredModel) -> tuple[LoRA, StoredModel]:
    """Return the LoRA and the base of an adapter that llama.cpp can load.

    Raises:
        RecipeError: for a model that is not a plain LoRA adapter on a base model.
    """
    if stored.parent is None:
        raise RecipeError(
            f"{stored.id} is a whole network, not an adapter. Export with `--merged`",
            rule="export.no_adapter",
        )
    if stored.parent.parent is not None:
        raise RecipeError(
            f"{stored.id} is an adapter on the adapter {stored.parent.id}. Export with `--merged`",
            rule="export.stacked",
        )
    lora = _lora_of(stored)
    if not isinstance(lora, LoRA) or lora.dora:
        raise RecipeError(
            f"{stored.id} was tuned with {'dora' if isinstance(lora, LoRA) else lora.method}, and "
            "llama.cpp loads plain LoRA adapters only. Export with `--merged`",
            rule="export.unmergeable",
        )
    return lora, stored.parent


def _file_name(stored: StoredModel) -> str:
    """Return the id of a model as a part of a file name."""
    base, name = split_id(stored.id)
    return "-".join(part for part in (short_name(base), name) if part)


def _general_metadata(stored: StoredModel) -> GeneralMetadata:
    lineage = [stored, *(each for each in ancestors(stored) if isinstance(each, StoredModel))]
    licences = [each.manifest.licence for each in lineage if each.manifest.licence]
    return GeneralMetadata(
        name=stored.id,
        base=stored.root if stored.root != stored.id else None,
        licence=licences[0] if licences else None,
        sha256=stored.content_hash,
    )


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a whole network, without luthier's own files."""
    for path in source.iterdir():
        if path.name in OWN_FILES or path.stem == "loss":
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
