"""Models for other software: ``export`` writes them, ``quantize`` says what fewer bits would lose,
``backend_speeds`` what runs them fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from luthier.errors import LuthierError, RecipeError, data_errors
from luthier.sdk.model import stored_model

if TYPE_CHECKING:
    from luthier.models.manifest import ExportRecord, Manifest
    from luthier.sdk.model import Model
    from luthier.serving.backend_speed import BackendSpeeds
    from luthier.store.models import StoredModel
    from luthier.workflows.quantize import QuantizationReport

Format = Literal["safetensors", "onnx", "gguf"]
"""``safetensors`` for transformers, PEFT and diffusers, ``onnx`` for ONNX Runtime, ``gguf`` for
llama.cpp and Ollama."""


@dataclass(frozen=True)
class Export:
    """A folder that was written for other software, and how it was checked."""

    model: str
    folder: Path
    format: Format
    files: list[str]
    """Their names, sorted."""
    network: str
    """Its type, as transformers calls it."""
    of_diffusers: bool = False
    """Whether diffusers loads it, and not transformers."""
    record: ExportRecord | None = None
    """Of a GGUF or ONNX file: its hashes, and how near the answers from it are."""
    is_recorded: bool = False
    """Whether the record of the model and its certificate say so from now on: not of models that
    luthier did not make, nor of signed ones, whose signature would no longer hold."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        from luthier.models.nets import NETS

        found: dict[str, Any] = {
            "id": self.model, "folder": str(self.folder), "format": self.format,
            "network": self.network, "files": self.files,
        }  # fmt: skip
        if self.format == "safetensors":
            found["own_network"] = self.network in NETS and not self.of_diffusers
        if self.record is not None and self.format == "onnx":
            found["difference"] = self.record.score_error
        if self.record is not None and self.format == "gguf":
            parity = self.record.tokens
            found["parity"] = None if parity is None else parity.model_dump()
        return found


def export(
    model: str | Model | StoredModel,
    folder: str | Path,
    *,
    format: Format = "safetensors",
    merged: bool | None = None,
    quantization: str | None = None,
) -> Export:
    """Write a model to a new folder, for other software.

    Args:
        model: an id, a model in memory, or one on this machine.
        folder: that is not there yet, or is empty.
        format: ``safetensors`` (a Hugging Face directory, or an adapter for PEFT), ``onnx``
            (classifiers) or ``gguf`` (models that write, with a Modelfile for Ollama).
        merged: whether an adapter is folded into its base, or written alone; when not given, it is
            written alone as safetensors and folded in for the other formats.
        quantization: type of the weights of a GGUF file: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or
            q4_0; f16 when not given.

    Raises:
        RecipeError: for a model that the other software cannot run, or that answers otherwise there.
        RunConflict: where something is in the folder.
    """
    from luthier.models.load import read_config
    from luthier.models.pipelines import is_pipeline
    from luthier.serving.export import export as export_safetensors
    from luthier.serving.export import export_gguf, export_onnx
    from luthier.store.models import check_active, objective_of

    if format not in get_args(Format):
        raise RecipeError(f"there is no format {format!r}; take {', '.join(get_args(Format))}")
    if quantization is not None and format != "gguf":
        raise RecipeError(
            f"types of weights are chosen for GGUF files; leave them out for {format}"
        )
    stored, target = check_active(stored_model(model)), Path(folder).expanduser()
    network = read_config(stored.network_folder, objective_of(stored).head()).model_type
    record = None
    if format == "onnx":
        if merged is False:
            raise RecipeError("ONNX files hold whole networks; export the adapter merged")
        record = export_onnx(stored, target)
    elif format == "gguf":
        record = export_gguf(stored, target, merged is not False, quantization)
    else:
        export_safetensors(stored, target, bool(merged))
    is_recorded = record is not None and _record(stored, lambda each: each.with_export(record))
    files = sorted(path.name for path in target.iterdir())
    pipeline = is_pipeline(stored.network_folder)
    return Export(stored.id, target, format, files, network, pipeline, record, is_recorded)


def _record(stored: StoredModel, change: Callable[[Manifest], Manifest]) -> bool:
    """Change the record of the model that was measured, and its certificate; whether it was.

    What was exported or measured stands, also where the record cannot be written.
    """
    from luthier.models.manifest import SIGNATURE
    from luthier.store.models import is_recorded, update_record
    from luthier.workflows.certificate.certificate import certify

    if not is_recorded(stored):
        return False
    is_changed = False

    def change_same(manifest: Manifest) -> Manifest:
        # Meanwhile it may have been signed, or another model made under its name.
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
            "the record of %s does not say it: %s", stored.id, error
        )
        return False
    return is_changed


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
    from luthier.store.reports import hashes_of_data
    from luthier.workflows.quantize import measure_quantization

    stored = stored_model(model)
    found = measure_quantization(stored, load_rows(data, columns), to, note)
    measured = found.records(hashes_of_data(data))
    _record(stored, lambda manifest: manifest.with_quantized(measured))
    return found


def backend_speeds(
    model: str | Model | StoredModel,
    streams: Sequence[int] = (1, 8, 32),
    to: Sequence[str] = ("f16", "q8_0"),
    *,
    note: Callable[[str], None] = lambda text: None,
) -> BackendSpeeds:
    """Measure which backend writes a model fastest on this machine.

    Args:
        model: an id, a model in memory, or one on this machine; one that writes.
        streams: numbers of answers that are written at once, up to 64.
        to: types of llama.cpp's weights, as of :func:`export`.
        note: hears what is measured.

    Returns:
        Tokens a second of torch and of llama.cpp with each type, ``advice()`` in words and the setting
        that chooses the fastest, ``best(streams).setting``.
    """
    from luthier.models.gguf import check_quantization
    from luthier.serving import backend_speed

    types = [check_quantization(each) for each in to]
    return backend_speed.backend_speeds(stored_model(model), streams, types, note)
