"""``luthier models export`` and ``luthier models push``: models for other software."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.model import stored_model
from luthier.cli.terminal.console import new_table, print_table, print_text
from luthier.cli.terminal.options import Mapped, ModelSource
from luthier.errors import DataError, RecipeError
from luthier.exports.export import Format, change_record, check_settings, export_model
from luthier.files import new_target

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.exports.export import Export
    from luthier.exports.hub import Push
    from luthier.exports.onnx_int8 import ScoreLoss
    from luthier.exports.quantization import QuantizationCost
    from luthier.exports.writer import Phase
    from luthier.library.models import StoredModel
    from luthier.models.manifest import ExportRecord

VALIDATION_ROWS = 200
"""Most validation rows for the cost of quantization: a float32 pass of model and base, twice."""
SCORED_ROWS = 1000
"""Most validation rows for the score of an ONNX file in 8 bits."""
Merged = Annotated[bool | None, typer.Option("--merged/--adapter")]


def export(
    model: ModelSource,
    folder: Path,
    *,
    format: Format = "safetensors",
    merged: Merged = None,
    quantization: str | None = None,
    data: str | Path | None = None,
    columns: Mapped = None,
    reporter: Reporter | None = None,
) -> Export:
    """Export a model for other software.

    Safetensors are for transformers, PEFT and diffusers, ONNX files for ONNX Runtime, and GGUF files
    for llama.cpp and Ollama. GGUF weights are f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0; ONNX
    weights are float32 or int8.

    Args:
        model: Model id.
        folder: New or empty folder.
        format: File format.
        merged: Merge the adapter into its base, or export it.
        quantization: Type of the weights, e.g. q4_k_m or int8.
        data: Rows for the loss of quantization; default: validation rows.
        columns: Column of a key, e.g. prompt=question; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        The files, the comparison with the model, and the ``cost`` of quantization on ``data`` or
        the validation rows of the model's run.

    Raises:
        DataError: for unreadable or too long rows of ``data``.
        RecipeError: for a model that the other software cannot run, or whose replies differ there.
        RunConflict: if the folder is not empty.
    """
    from luthier.engine.metrics import Reporter

    reporter = reporter or Reporter()
    check_settings(format, merged, quantization)
    # Before the imports of torch and of the model, which take seconds.
    target = Path(folder).expanduser()
    new_target(target)
    stored = stored_model(model)
    if format == "gguf":
        from luthier.library.models import check_writes

        check_writes(stored)
    if data is not None and (format == "safetensors" or quantization is None):
        raise RecipeError("`data` needs --format gguf or onnx, and --quantization")
    cost = None
    if quantization is not None and format == "gguf" and (data or quantization.startswith("q")):
        # Before the export, so that unreadable rows are refused before minutes of writing.
        cost = _measure_cost(stored, target, data, columns, quantization, reporter)

    def move(phase: Phase, done: int, total: int) -> None:
        if phase == "write":
            # In megabytes, because the bar shows whole numbers and bytes would fill its line.
            whole = max(1, round(total / 1e6))
            reporter.progress(done * whole // total, whole, "write (MB)")
        else:
            reporter.progress(done, total, phase)

    written = export_model(stored, target, format, merged, quantization, move)
    if format == "safetensors" and getattr(stored.objective, "thresholds", None):
        reporter.note("thresholds of labels are in config.json; transformers does not apply them")
    if format == "onnx" and quantization is not None:
        return replace(written, cost=_measure_onnx(stored, target, data, columns, reporter))
    return replace(written, cost=cost)


def _measure_cost(
    stored: StoredModel,
    target: Path,
    data: str | Path | None,
    columns: Mapping[str, str] | None,
    quantization: str,
    reporter: Reporter,
) -> QuantizationCost | None:
    """Measure the cost of quantization before the export, and store the cost in the record.

    Without ``data``, the validation rows of an SFT run are measured, if they are unchanged.
    """
    from luthier.data.rows import load_rows
    from luthier.exports.quantization import measure_quantization
    from luthier.library.reports import hashes_of_data
    from luthier.workflows.training_overlap import row_remarks, validation_rows

    files, remarks = list[str | Path](), list[str]()
    if data is not None:
        rows, files = load_rows(data, columns), [data]
        remarks = row_remarks(stored, data, rows)
    elif stored.objective.method == "sft":
        rows, files = validation_rows(stored)
        rows = rows[:VALIDATION_ROWS]
    if not files:
        return None
    for remark in remarks:
        reporter.note(remark)
    if data is None:
        reporter.stage(f"Measuring {quantization} on {len(rows):,} validation rows")
    try:
        cost = measure_quantization(stored, rows, quantization, remarks)
    except (DataError, RecipeError) as error:
        if data is not None:
            raise
        reporter.note(f"{quantization} is not measured: {error}")
        return None
    record = cost.record(hashes_of_data(*files))
    change_record(stored, lambda manifest: manifest.with_quantized(record))
    return cost


def _measure_onnx(
    stored: StoredModel,
    target: Path,
    data: str | Path | None,
    columns: Mapping[str, str] | None,
    reporter: Reporter,
) -> ScoreLoss | None:
    """Return the loss of score of an ONNX file in 8 bits, on ``data`` or the validation rows."""
    from luthier.data.rows import load_rows
    from luthier.exports.onnx import ONNX_FILE
    from luthier.exports.onnx_int8 import measure_int8
    from luthier.workflows.training_overlap import row_remarks, validation_rows

    rows = validation_rows(stored)[0] if data is None else load_rows(data, columns)
    for remark in [] if data is None else row_remarks(stored, data, rows):
        reporter.note(remark)
    if len(rows) < 2:
        reporter.note("the loss of score is not measured: the validation rows are missing")
        return None
    rows = rows if data is not None else rows[:SCORED_ROWS]
    reporter.stage(f"Measuring int8 on {len(rows):,} rows")
    try:
        return measure_int8(stored, target / ONNX_FILE, rows)
    except (DataError, RecipeError) as error:
        if data is not None:
            raise
        reporter.note(f"the loss of score is not measured: {error}")
        return None


def show_export(written: Export) -> None:
    """Print the files, the comparison and compatible software."""
    from luthier.exports.onnx_int8 import ScoreLoss

    print_text(f"{written.model} exported to {written.folder}")
    if written.record is not None:
        _print_record(written, written.record)
    if isinstance(written.cost, ScoreLoss):
        is_worse = written.cost.difference.significant
        print_text(f"{'warning: ' * is_worse}{written.cost.verdict()}")
    if written.format == "gguf":
        _print_gguf(written)
    elif written.format == "safetensors":
        print_readers(written)


def print_readers(written: Export) -> None:
    """Print how to load safetensors that transformers and PEFT alone cannot load."""
    from luthier.files import read_json

    if written.of_diffusers:
        whole = "model_index.json" in written.files
        call = "StableDiffusionPipeline.from_pretrained" if whole else "pipe.load_lora_weights"
        print_text(f"Load with diffusers: {call}({str(written.folder)!r})")
        return
    is_adapter, own = "adapter_config.json" in written.files, written.own_network
    if is_adapter and "luthier" in read_json(written.folder / "adapter_config.json"):
        print_text("Only luthier can load this adapter: PEFT has no adapter of this kind.")
    elif is_adapter and own:
        print_text(
            f"Only luthier can load this adapter: {written.network} is a network of luthier."
        )
    elif own:
        print_text(f"{written.network} is a network of luthier. Before loading with transformers,")
        print_text("call `luthier.models.networks.classic.register()` of an installed luthier.")
    else:
        return
    command = f"luthier models export {written.model} FOLDER"
    if is_adapter and own:
        register = "`luthier.models.networks.classic.register()`"
        print_text(f"For transformers: {command} --merged")
        print_text(f"Before loading, call {register} of an installed luthier.")
    if written.suits_onnx:
        print_text(f"Without luthier, use ONNX Runtime: {command} --format onnx")
    elif is_adapter and not own:
        print_text(f"For transformers, if the adapter can be merged: {command} --merged")


def _print_record(written: Export, record: ExportRecord) -> None:
    """Print the files, and the differences to the stored model."""
    for name in record.files:
        if name.endswith((".gguf", ".onnx")):
            size = (written.folder / name).stat().st_size
            print_text(f"  {name} ({size / 1e6:,.1f} MB)")
    if record.compared_in is None:
        print_text("Not compared: llama.cpp is missing. pip install 'luthier[llama-cpp]'")
    else:
        print_text(f"Compared: {record.describe(_token_text(written.model))}")
    if not written.is_recorded:
        print_text("Export not recorded: the model is signed, or not in this library.")


def _token_text(model: str) -> Callable[[int], str]:
    """Return a function from token ids of ``model`` to text. The model is on this machine."""
    from luthier.library.models import find

    return lambda token: find(model).chat.replies.decode([token])


def _print_cost(cost: QuantizationCost) -> None:
    """Print the losses with intervals of 95 %, the size, and the verdict."""
    table = new_table("weights", "loss", "95 %", "MB", numbers=("loss", "MB"))
    sizes = ("", f"{cost.file_bytes / 1e6:,.1f}")
    for name, loss, size in zip(
        ("unquantized", cost.quantization), cost.losses, sizes, strict=True
    ):
        low, high = loss.interval
        table.add_row(name, f"{loss.value:.4f}", f"{low:.4f} to {high:.4f}", size)
    print_table(table)
    print_text(f"warning: {cost.verdict()}" if cost.is_high else cost.verdict())


def _print_gguf(written: Export) -> None:
    """Print the cost of quantization, and the command for Ollama."""
    from luthier.exports.ollama import FROM_BASE
    from luthier.exports.quantization import QuantizationCost

    if isinstance(written.cost, QuantizationCost):
        _print_cost(written.cost)
    if any(name.endswith("-LoRA.gguf") for name in written.files):
        print_text(FROM_BASE)
    print_text(f"For Ollama: ollama create NAME -f {written.folder / 'Modelfile'}")


def push(
    model: ModelSource,
    to: Annotated[str, typer.Option("--to")],
    *,
    format: Format = "safetensors",
    merged: Merged = None,
    quantization: str | None = None,
    public: bool = False,
    reporter: Reporter | None = None,
) -> Push:
    """Upload a model to the Hugging Face hub.

    The model card comes from the certificate. A new repository is private, and other files in a
    repository stay. The token is HF_TOKEN, or the token of `hf auth login`. After a failure, the same
    command sends only missing files.

    Args:
        model: Id of a model with a certificate.
        to: Repository on the Hugging Face hub: hub:owner/name.
        format: File format.
        merged: Merge the adapter into its base, or upload it.
        quantization: Type of the weights of a GGUF file.
        public: Make the repository public.
        reporter: Receives progress; silent if not given.

    Returns:
        The address of the repository, the commit and the files.

    Raises:
        RecipeError: before the upload, without a token or for an invalid or unsuitable repository.
        UploadError: if the hub does not answer or rejects the upload.
    """
    from luthier.engine.metrics import Reporter
    from luthier.exports.hub import push as run

    note = (reporter or Reporter()).note
    return run(stored_model(model), to, format, merged, quantization, public, note)


def show_push(done: Push) -> None:
    """Print the address of the repository."""
    visible = "private" if done.private else "public"
    print_text(f"{done.model}: {done.url} ({visible}), commit {done.commit}")
