"""Export of a stored model: write the files, compare the outputs, record the export."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from luthier.errors import LuthierError, RecipeError

if TYPE_CHECKING:
    from luthier.exports.onnx_int8 import ScoreLoss
    from luthier.exports.quantization import QuantizationCost
    from luthier.exports.writer import OnProgress
    from luthier.library.models import StoredModel
    from luthier.models.manifest import ExportRecord, Manifest

Format = Literal["safetensors", "onnx", "gguf"]
"""``safetensors`` for transformers, PEFT and diffusers, ``onnx`` for ONNX Runtime, ``gguf`` for
llama.cpp and Ollama."""


@dataclass(frozen=True)
class Export:
    """An exported folder and the result of its comparison with the stored model."""

    model: str
    folder: Path
    format: Format
    files: list[str]
    """File names, sorted."""
    network: str
    """Type of the network in transformers."""
    of_diffusers: bool = False
    """True if diffusers instead of transformers loads the export."""
    record: ExportRecord | None = None
    """Hashes and parity of a GGUF or ONNX file."""
    is_recorded: bool = False
    """True if the record and the certificate of the model list the export. Foreign models have no
    record, and a changed record would break the signature of a signed model."""
    suits_onnx: bool = False
    """True if the model can also be exported as ONNX."""
    cost: QuantizationCost | ScoreLoss | None = None
    """The cost of fewer bits, if measured: in nats for a GGUF file, in score for an ONNX file."""

    @property
    def own_network(self) -> bool:
        """True if the network is one of luthier's own, unknown to transformers."""
        from luthier.models.networks.classic import NETS

        return self.network in NETS and not self.of_diffusers

    def plain(self) -> dict[str, Any]:
        """Return the export as JSON values."""
        values: dict[str, Any] = {
            "id": self.model, "folder": str(self.folder), "format": self.format,
            "network": self.network, "files": self.files,
        }  # fmt: skip
        if self.format == "safetensors":
            values["own_network"] = self.own_network
        if self.record is not None and self.format == "onnx":
            values["difference"] = self.record.score_error
        if self.record is not None and self.format == "gguf":
            parity = self.record.tokens
            values["parity"] = None if parity is None else parity.model_dump()
        if self.cost is not None:
            values["cost"] = self.cost.plain()
        return values


def check_settings(format: str, merged: bool | None, quantization: str | None) -> None:
    """Check settings that are invalid for every model.

    Raises:
        RecipeError: naming the setting.
    """
    if format not in get_args(Format):
        raise RecipeError(f"unknown format {format!r}. Choose one of {', '.join(get_args(Format))}")
    if quantization is not None and format == "safetensors" and merged:
        from luthier.exports.writer import PRECISIONS

        if quantization not in PRECISIONS:
            raise RecipeError(
                f"merged safetensors cannot have the type {quantization!r}. Choose one of "
                f"{', '.join(PRECISIONS)}"
            )
    elif format == "onnx" and quantization is not None:
        if quantization != "int8":
            raise RecipeError(f"ONNX files cannot have the type {quantization!r}. Use int8")
    elif quantization is not None:
        if format != "gguf":
            raise RecipeError(
                "`--quantization` is for GGUF files, ONNX files and merged safetensors. Omit "
                "`--quantization` for an adapter"
            )
        from luthier.models.formats.gguf import check_quantization

        check_quantization(quantization)
        if merged is False:
            raise RecipeError("an adapter has no `--quantization`. Export with `--merged`")
    if format == "onnx" and merged is False:
        raise RecipeError("ONNX files contain whole networks. Export with `--merged`")


def export_model(
    stored: StoredModel,
    target: Path,
    format: Format,
    merged: bool | None,
    quantization: str | None,
    on_progress: OnProgress | None = None,
) -> Export:
    """Write ``stored`` to the new folder ``target``; see :func:`luthier.export`.

    Raises:
        RecipeError: for a model that the target software cannot run, or with different outputs
            there.
        RunConflict: if the folder has files.
    """
    from luthier.exports.onnx import export_onnx, suits_onnx
    from luthier.exports.writer import export, export_gguf, ignore_progress
    from luthier.library.models import check_active

    check_settings(format, merged, quantization)
    check_active(stored)
    on_phase = on_progress or ignore_progress
    network = stored.network.config(stored.objective.head()).model_type
    record = None
    if format == "onnx":
        record = export_onnx(stored, target, on_phase, quantization)
    elif format == "gguf":
        record = export_gguf(stored, target, merged is not False, quantization, on_phase)
    else:
        export(stored, target, bool(merged), on_phase, quantization)
    is_recorded = record is not None and change_record(
        stored, lambda manifest: manifest.with_export(record)
    )
    files = sorted(path.name for path in target.iterdir())
    pipeline = stored.network.is_pipeline
    suits = suits_onnx(stored, network)
    return Export(stored.id, target, format, files, network, pipeline, record, is_recorded, suits)


_FIXED_BYTES = 1 << 29
"""Memory of a process with torch and transformers, in bytes."""


def memory_needed(
    stored: StoredModel, format: Format, merged: bool | None, quantization: str | None = None
) -> int:
    """Return the peak memory of :func:`export_model` in bytes, from the number of weights.

    Copies per weight:

    - safetensors: the network and a copy in at most float32, or the network alone for a model
      without a parent; the comparison loads one network
    - GGUF: the network, the network in float32 for the comparison, the file opened by llama.cpp
    - GGUF adapter: two networks and the file of the base
    - ONNX: the network in float32, the traced graph, the written bytes, and ONNX Runtime's copy
    """
    from luthier.engine.machine import choose_machine

    network = stored.network.sketch(stored.objective.head())
    count = sum(weight.numel() for weight in network.parameters())
    if format == "gguf":
        bytes_each = 16 if merged is False else choose_machine().dtype.itemsize + 8
    elif format == "onnx":
        bytes_each = 20
    else:
        bytes_each = 4 if stored.parent is None and quantization is None else 8
    return _FIXED_BYTES + count * bytes_each


def change_record(stored: StoredModel, change: Callable[[Manifest], Manifest]) -> bool:
    """Update the record and the certificate of a model. Return whether both were updated.

    Failures are logged: a finished export or measurement is valid without a record.
    """
    from luthier.library.models import is_recorded, update_record
    from luthier.models.manifest import SIGNATURE
    from luthier.workflows.certificate.certificate import certify

    if not is_recorded(stored):
        return False
    is_changed = False

    def change_same(manifest: Manifest) -> Manifest:
        # Another process may have signed or replaced the model during the export.
        nonlocal is_changed
        signed = (stored.folder / SIGNATURE).exists()
        is_changed = manifest.files == stored.manifest.files and not signed
        return change(manifest) if is_changed else manifest

    try:
        update_record(stored, change_same)
        if is_changed:
            certify(stored.id)
    except (LuthierError, OSError) as error:
        logging.getLogger(__name__).warning(
            "the record of %s was not updated: %s", stored.id, error
        )
        return False
    return is_changed
