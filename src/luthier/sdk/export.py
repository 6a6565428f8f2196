"""Export of models for other software, and the loss of quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import data_errors
from luthier.sdk.model import stored_model
from luthier.workflows.export import Export, Format, change_record, export_model

if TYPE_CHECKING:
    from luthier.sdk.model import Model
    from luthier.serving.export import OnProgress
    from luthier.store.models import StoredModel
    from luthier.workflows.quantize import QuantizationReport


def export(
    model: str | Model | StoredModel,
    folder: str | Path,
    *,
    format: Format = "safetensors",
    merged: bool | None = None,
    quantization: str | None = None,
    on_progress: OnProgress | None = None,
) -> Export:
    """Write a model to a new folder, for other software.

    Args:
        model: an id, a model in memory, or one on this machine.
        folder: that is not there yet, or is empty.
        format: ``safetensors`` (a Hugging Face directory, or an adapter for PEFT), ``onnx``
            (classifiers) or ``gguf`` (models that write, with a Modelfile for Ollama).
        merged: whether an adapter is folded into its base, or written alone; when not given, it is
            written alone as safetensors and folded in for the other formats.
        quantization: type of the weights. GGUF: f32, f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m or
            q4_0. Merged safetensors: f32, f16 or bf16; the precision of the base if not given.
        on_progress: hears the part of the work (``merge``, ``trace``, ``write``, ``compare``), how much
            of it is done and how much there is; of ``write`` in bytes, and from another thread.

    Raises:
        RecipeError: for a model that the other software cannot run, or that answers otherwise there.
        RunConflict: where something is in the folder.
    """
    target = Path(folder).expanduser()
    return export_model(stored_model(model), target, format, merged, quantization, on_progress)


@data_errors("nothing was quantized")
def quantize(
    model: str | Model | StoredModel,
    data: str | Path,
    to: Sequence[str] = ("q8_0", "q4_0"),
    *,
    columns: Mapping[str, str] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> QuantizationReport:
    """Say what a model loses on your own rows where its weights get fewer bits, and what that gains.

    Args:
        model: an id, a model in memory, or one on this machine; one that writes.
        data: rows that it was not trained on.
        to: types of weights, as of :func:`export`.
        columns: the file's name for each of our keys.
        note: hears what is measured.

    Returns:
        For each type the loss with its interval, the size, and whether it erases what tuning gained;
        ``verdict()`` in words. The record of the model says it, too, as of :func:`export`.
    """
    from luthier.data.rows import load_rows
    from luthier.serving.evaluation import row_remarks
    from luthier.store.reports import hashes_of_data
    from luthier.workflows.quantize import measure_quantization

    stored, rows = stored_model(model), load_rows(data, columns)
    remarks = row_remarks(stored, data, rows)
    for remark in remarks:  # before what takes minutes
        note(remark)
    found = replace(measure_quantization(stored, rows, to, note), remarks=remarks)
    measured = found.records(hashes_of_data(data))
    change_record(stored, lambda manifest: manifest.with_quantized(measured))
    return found
