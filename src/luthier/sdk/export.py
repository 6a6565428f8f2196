"""Export of models for other software."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.exports.export import Export, Format, change_record, check_settings, export_model
from luthier.sdk.model import stored_model

if TYPE_CHECKING:
    from luthier.exports.quantization import QuantizationCost
    from luthier.exports.writer import OnProgress
    from luthier.library.models import StoredModel
    from luthier.sdk.model import Model


def export(
    model: str | Model | StoredModel,
    folder: str | Path,
    *,
    format: Format = "safetensors",
    merged: bool | None = None,
    quantization: str | None = None,
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
    note: Callable[[str], None] = lambda text: None,
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
        data: rows that the model was not trained on. The loss of these rows is measured with the
            weights before and after quantization, and the result is ``cost`` of the return value.
            The record of the model keeps it, too.
        columns: the file's name for each of our keys.
        on_progress: hears the part of the work (``merge``, ``trace``, ``write``, ``compare``), how much
            of it is done and how much there is; of ``write`` in bytes, and from another thread.
        note: hears why the rows of ``data`` say less than they seem to.

    Raises:
        DataError: for rows of ``data`` that cannot be read, or are too long.
        RecipeError: for a model that the other software cannot run, or that answers otherwise there.
        RunConflict: where something is in the folder.
    """
    stored, target = stored_model(model), Path(folder).expanduser()
    cost = None
    if data is not None:
        if format != "gguf" or quantization is None:
            raise RecipeError(
                "rows measure a type of weights: give format gguf and quantization, too"
            )
        check_settings(format, merged, quantization)
        cost = _measure_cost(stored, target, data, columns, quantization, note)
    written = export_model(stored, target, format, merged, quantization, on_progress)
    return replace(written, cost=cost)


def _measure_cost(
    stored: StoredModel,
    target: Path,
    data: str | Path,
    columns: Mapping[str, str] | None,
    quantization: str,
    note: Callable[[str], None],
) -> QuantizationCost:
    """Measure the cost of a type, before the export itself, and write it to the model's record."""
    from luthier.data.rows import load_rows
    from luthier.exports.quantization import measure_quantization
    from luthier.exports.writer import new_target
    from luthier.library.reports import hashes_of_data
    from luthier.workflows.training_overlap import row_remarks

    new_target(target)  # refuses a folder that is not empty
    rows = load_rows(data, columns)
    remarks = row_remarks(stored, data, rows)
    for remark in remarks:
        note(remark)
    cost = measure_quantization(stored, rows, quantization, remarks)
    record = cost.record(hashes_of_data(data))
    change_record(stored, lambda manifest: manifest.with_quantized(record))
    return cost
