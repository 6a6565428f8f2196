"""Models for other software: ``export`` writes them, ``quantize`` says what fewer bits would lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from luthier.errors import RecipeError, data_errors
from luthier.sdk.model import stored_model

if TYPE_CHECKING:
    from luthier.sdk.model import Model
    from luthier.serving.gguf_parity import GgufParity
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
    difference: float | None = None
    """Of an ONNX file: the largest difference of a score, beside the largest score."""
    parity: GgufParity | None = None
    """Of a GGUF file: how near llama.cpp's answers are; ``None`` where it is not installed."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        from luthier.models.nets import NETS

        found: dict[str, Any] = {
            "id": self.model, "folder": str(self.folder), "format": self.format,
            "network": self.network, "files": self.files,
        }  # fmt: skip
        if self.format == "safetensors":
            found["own_network"] = self.network in NETS and not self.of_diffusers
        if self.format == "onnx":
            found["difference"] = self.difference
        if self.format == "gguf":
            found["parity"] = None if self.parity is None else self.parity.plain()
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
    difference = parity = None
    if format == "onnx":
        if merged is False:
            raise RecipeError("ONNX files hold whole networks; export the adapter merged")
        difference = export_onnx(stored, target)
    elif format == "gguf":
        parity = export_gguf(stored, target, merged is not False, quantization)
    else:
        export_safetensors(stored, target, bool(merged))
    files = sorted(path.name for path in target.iterdir())
    pipeline = is_pipeline(stored.network_folder)
    return Export(stored.id, target, format, files, network, pipeline, difference, parity)


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
        ``verdict()`` in words.
    """
    from luthier.data.rows import load_rows
    from luthier.workflows.quantize import measure_quantization

    return measure_quantization(stored_model(model), load_rows(data, columns), to, note)
