"""ONNX exports of encoders: classifiers, taggers, ratings, rewards and embeddings.

``model.onnx`` computes the output from token ids or pixels: pooling, normalization of embeddings
and the scale of ratings are part of the graph. The folder also has the configuration of the network
with the class names, the tokenizer or image processor, ``onnx.json`` with inputs and output, and a
README with example code.

Before the folder appears, the outputs of ONNX Runtime are compared with luthier's on fixed texts of
several lengths, one text per batch and several texts per batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier import __version__
from luthier.data.shapes.texts import RawText
from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.parity import REFERENCE_PROMPTS
from luthier.exports.onnx_int8 import quantize
from luthier.exports.writer import (
    OnProgress,
    ignore_progress,
    load_merged,
    new_export_folder,
)
from luthier.files import hashes_of, new_target, write_bytes, write_json
from luthier.inference.prediction import Predictor
from luthier.library.models import StoredModel, check_mergeable
from luthier.models.formats.save import save_format
from luthier.models.load import as_network
from luthier.models.manifest import ExportRecord, created_now
from luthier.models.networks.heads import HEADS, head_kind, padding_id
from luthier.models.networks.layouts import pooled_states
from luthier.models.networks.modalities import is_dual_encoder, media_inputs

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives import Objective
    from luthier.tasks.onnx import OnnxOutput
    from luthier.types import Example, FloatArray, IntArray

ONNX_FILE, ONNX_CONFIG, README = "model.onnx", "onnx.json", "README.md"
ONNX_ERROR = 1e-3
"""Largest allowed difference from luthier's outputs, relative to the largest output. At least ten
times the measured differences (docs/log/service.md)."""
LONG_TEXT = 200
"""Words of the longest compared text."""
COMPARED_TEXTS = (
    "Yes.",
    *REFERENCE_PROMPTS,
    " ".join(f"fox {number}" for number in range(LONG_TEXT // 2)),
)
"""Fixed texts of 1 to :data:`LONG_TEXT` words, which no model was trained on."""
_CPU = torch.device("cpu")


class _Graph(torch.nn.Module):
    """A network with positional tensors as inputs and a single output."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def outputs(self, inputs: Sequence[Tensor]) -> Any:
        """Return the outputs of the network for positional inputs."""
        return self.model(**dict(zip(self.names, inputs, strict=True)))


class _Logits(_Graph):
    """Class scores of each row ``[R, C]`` or of each token ``[R, T, C]``."""

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.outputs(inputs).logits
        return logits


class _Number(_Graph):
    """A number per row ``[R]``, in the scale of the data."""

    def __init__(self, model: Any, names: Sequence[str], scale: float, center: float) -> None:
        super().__init__(model, names)
        self.scale, self.center = scale, center

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.outputs(inputs).logits
        return logits[:, 0] * self.scale + self.center


class _TextEmbedding(_Graph):
    """Text embeddings ``[R, H]`` of length 1."""

    def __init__(self, model: Any, names: Sequence[str], pooling: str) -> None:
        super().__init__(model, names)
        self.pooling = pooling

    def forward(self, *inputs: Tensor) -> Tensor:
        state_RTH, mask_RT = self.outputs(inputs).last_hidden_state, inputs[1]
        if self.pooling == "first":
            pooled_RH = state_RTH[:, 0]
        elif self.pooling == "last":
            last_R11 = (mask_RT.sum(1) - 1)[:, None, None].expand(-1, 1, state_RTH.shape[-1])
            pooled_RH = state_RTH.gather(1, last_R11)[:, 0]
        else:
            total_RH = (state_RTH * mask_RT[..., None]).sum(1)
            pooled_RH = total_RH / mask_RT.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled_RH, dim=-1)


class _MediaEmbedding(_Graph):
    """Image or audio embeddings ``[R, H]`` of length 1."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pooled_states(self.model, inputs[0]), dim=-1)


Read = Callable[["Network", "TreeBatch"], Iterable["FloatArray"]]
"""Returns luthier's own outputs for the rows of a micro-batch, in order."""
_GRAPHS: Mapping[str, Callable[..., _Graph]] = {
    "scores": _Logits,
    "number": _Number,
    "text_embedding": _TextEmbedding,
    "media_embedding": _MediaEmbedding,
}
"""Graphs by the name in :class:`~luthier.tasks.onnx.OnnxOutput`."""


def _predictions(objective: Objective, network: Network, batch: TreeBatch) -> Iterator[FloatArray]:
    for each in objective.predict(network, batch):
        (value,) = each.values()
        yield np.asarray(value, dtype=np.float32)


def _token_scores(network: Network, batch: TreeBatch) -> Iterator[FloatArray]:
    scores_MC = network.token_scores(batch, torch.from_numpy(batch.tree.node_M)).float()
    for part_TC in scores_MC.split([len(example) for example in batch.tree.examples]):
        yield part_TC.numpy()


def _row_scores(network: Network, batch: TreeBatch) -> Iterator[FloatArray]:
    yield from network.row_scores(batch).float().numpy()


def _reads(objective: Objective, output: OnnxOutput) -> Read:
    reads: dict[str, Read] = {
        "row_scores": _row_scores,
        "token_scores": _token_scores,
        "predictions": partial(_predictions, objective),
    }
    return reads[output.reads]


_UNTRACED = ("elmo", "xlnet")
"""Networks that PyTorch cannot trace."""


def suits_onnx(stored: StoredModel, network: str) -> bool:
    """Return whether :func:`export_onnx` can probably export the model, from type and objective
    alone."""
    if not stored.objective.task.exports_onnx or network in _UNTRACED:
        return False
    try:
        check_mergeable(stored, "an ONNX file contains merged weights only")
    except RecipeError:
        return False
    return True


@torch.no_grad()
def export_onnx(
    stored: StoredModel,
    target: Path,
    on_progress: OnProgress = ignore_progress,
    quantization: str | None = None,
) -> ExportRecord:
    """Write an encoder to the new folder ``target`` for ONNX Runtime and return the record.

    Inputs of ``model.onnx``: ``pixel_values`` ``[batch, C, H, W]``, or ``input_ids`` and
    ``attention_mask`` ``[batch, tokens]``, for any number of rows and tokens. Outputs in float32:
    ``logits`` of a classifier ``[batch, classes]`` or a tagger ``[batch, tokens, tags]``,
    ``rating`` or ``reward`` ``[batch]``, or ``sentence_embedding`` (``media_embedding``) ``[batch,
    hidden]``. With ``quantization`` ``int8``, the weights have 8 bits
    (:mod:`luthier.exports.onnx_int8`).

    Raises:
        RecipeError: for a model without such an output, a network that cannot be traced, different
            outputs in ONNX Runtime, or missing packages.
        RunConflict: if the folder has files.
    """
    target = new_target(target)
    objective = stored.objective
    if not objective.task.exports_onnx:
        raise RecipeError(
            f"ONNX export supports classifiers, taggers, ratings, rewards and embeddings, and "
            f"{stored.id} is for {objective.method}. Export text generators with `--format gguf`",
            rule="export.task",
        )
    check_mergeable(stored, "an ONNX file contains merged weights only")
    for package in ("onnx", "onnxscript", "onnxruntime"):  # before loading the network
        if find_spec(package) is None:
            raise RecipeError(
                f"the package {package} is not installed: pip install 'luthier[onnx]'",
                rule="export.extra",
            )
    chat = stored.chat
    network = as_network(load_merged(stored, torch.float32, _CPU, on_progress), _CPU, torch.float32)
    if is_dual_encoder(network.model.config):
        raise RecipeError(
            f"{stored.id} has separate encoders for images and text, and ONNX export supports one "
            "encoder",
            rule="export.network",
        )
    pads = getattr(network.model.config, "pad_token_id", None) is not None
    if chat.media is None and HEADS[head_kind(network.model)].output == "row_scores" and not pads:
        # transformers finds the last token of each row by the padding token.
        raise RecipeError(
            f"{stored.id} has no padding token, which batches of several lengths need",
            rule="export.padding",
        )
    answer = objective.task.onnx(objective, network)
    rows: list[_Row] = []
    if chat.media is None:
        rows = _read_texts(network, objective, chat, stored, _reads(objective, answer))
    del network  # transformers traces its own modules
    model: Any = load_merged(stored, torch.float32, _CPU, ignore_progress)
    model.eval()
    with new_export_folder(target, stored) as fresh:
        inputs = _traced_inputs(model, chat)
        graph = _GRAPHS[answer.graph](model, [*inputs], **answer.settings).eval()
        on_progress("trace", 0, 1)
        _trace(graph, inputs, answer, fresh / ONNX_FILE, stored.id)
        on_progress("trace", 1, 1)
        error = _largest_error(graph, answer, chat, rows, fresh / ONNX_FILE, on_progress)
        if not error <= ONNX_ERROR:
            raise RecipeError(
                f"outputs of ONNX Runtime differ: {answer.name} differs by up to {error:.2g} of "
                f"{'the spread of ratings' if answer.unit else 'the largest number'}, and "
                f"{ONNX_ERROR:g} is allowed",
                rule="export.differs",
            )
        if quantization is not None:
            quantize(fresh / ONNX_FILE, stored.id)
            error = _largest_error(graph, answer, chat, rows, fresh / ONNX_FILE, on_progress)
        model.config.save_pretrained(fresh)
        save_format(chat, fresh)
        config = {
            "model": stored.id,
            "objective": objective.method,
            "inputs": {name: ["batch", *_axes(name)[1:]] for name in inputs},
            "output": {"name": answer.name, "axes": [*answer.axes], "meaning": answer.meaning},
            "max_tokens": None if chat.media else stored.room,
            "template": None if chat.media else chat.template.kind,
            "pad_token_id": None if chat.media else padding_id(model),
            **answer.details,
        }
        write_json(fresh / ONNX_CONFIG, config)
        write_bytes(fresh / README, _readme(stored.id, answer, chat).encode())
        return ExportRecord(
            format="onnx",
            quantization=quantization,
            created=created_now(),
            luthier=__version__,
            files=hashes_of(fresh),
            compared_in=f"ONNX Runtime {version('onnxruntime')}",
            tolerance=ONNX_ERROR if quantization is None else None,
            score_error=error,
        )


@dataclass(frozen=True)
class _Row:
    """A text as token ids, with luthier's own output."""

    ids_T: IntArray
    answer: FloatArray


def _read_texts(
    network: Network, objective: Objective, chat: ChatFormat, stored: StoredModel, read: Read
) -> list[_Row]:
    """Return luthier's outputs for :data:`COMPARED_TEXTS`, computed as in serving."""
    room = stored.room
    predictor = Predictor(network, objective, chat, room)
    examples: list[Example] = []
    for number, text in enumerate(COMPARED_TEXTS):
        try:
            example = predictor.encode(RawText("text", number + 1, text), number)
        except RowRefused:  # a tokenizer may have no token for a script
            continue
        examples.append(objective.truncate(example, room) if len(example) > room else example)
    if not examples:
        raise RecipeError(
            f"the tokenizer of {stored.id} has no tokens for the texts of the comparison"
        )
    answers = network.read_rows(examples, READING_BUDGET, partial(read, network))
    rows = zip(examples, answers, strict=True)
    return [_Row(example.ids_T, answer) for example, answer in rows]


def _axes(name: str) -> tuple[str, ...]:
    """Return the names of an input's axes. Of media inputs, only the batch axis is dynamic."""
    return ("batch", "tokens") if name in ("input_ids", "attention_mask") else ("batch",)


def _traced_inputs(model: Any, chat: ChatFormat, rows: int = 2) -> dict[str, Tensor]:
    """Return ``rows`` random images, or random tokens of two lengths."""
    generator = torch.Generator().manual_seed(rows)
    if chat.media is not None:
        return media_inputs(model, torch.randn(rows, *chat.media.shape, generator=generator))
    tokens = 8 * rows
    ids_RT = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    mask_RT = torch.ones_like(ids_RT)
    ids_RT[0, 5:], mask_RT[0, 5:] = padding_id(model), 0
    return {"input_ids": ids_RT, "attention_mask": mask_RT}


def _trace(
    graph: _Graph, inputs: dict[str, Tensor], answer: OnnxOutput, file: Path, name: str
) -> None:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    shapes = tuple(dict(enumerate(_axes(each))) for each in inputs)
    try:
        quiet.setLevel(logging.ERROR)  # torch warns about each missing operator of torchvision
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                str(file),
                input_names=[*inputs],
                output_names=[answer.name],
                dynamic_shapes=(shapes,),
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


def _largest_error(
    graph: _Graph,
    answer: OnnxOutput,
    chat: ChatFormat,
    rows: Sequence[_Row],
    file: Path,
    on_progress: OnProgress,
) -> float:
    """Return the largest difference between luthier and ONNX Runtime, in the unit of the answer.

    Texts are compared one by one, in a batch of two and in one batch, to vary both axes. Images are
    compared in batches of one and three with the output of transformers.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    batches: list[tuple[dict[str, Tensor], list[FloatArray]]] = []
    if chat.media is not None:
        for count in (1, 3):
            inputs = _traced_inputs(graph.model, chat, count)
            batches.append((inputs, list(graph(*inputs.values()).float().numpy())))
    else:
        fill = padding_id(graph.model)
        for part in (*([row] for row in rows), rows[:2], rows):
            batches.append((_pad(part, fill), [row.answer for row in part]))
    largest_output, largest_difference = 1e-6, 0.0
    for number, (inputs, expected) in enumerate(batches, 1):
        (outputs,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
        for row, own in zip(outputs, expected, strict=True):
            # Tags of padding have no meaning.
            difference = float(np.abs(row[: len(own)] - own if own.ndim else row - own).max())
            largest_difference = (
                max(largest_difference, difference) if np.isfinite(difference) else float("nan")
            )
            largest_output = max(largest_output, float(np.abs(own).max()))
        on_progress("compare", number, len(batches))
        if largest_difference != largest_difference:
            return largest_difference
    return largest_difference / (answer.unit or largest_output)


def _pad(rows: Sequence[_Row], fill: int) -> dict[str, Tensor]:
    """Return texts as a right-padded batch."""
    shape = len(rows), max(len(row.ids_T) for row in rows)
    ids_RT, mask_RT = torch.full(shape, fill), torch.zeros(shape, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_RT[number, : len(row.ids_T)] = torch.from_numpy(row.ids_T)
        mask_RT[number, : len(row.ids_T)] = 1
    return {"input_ids": ids_RT, "attention_mask": mask_RT}


_TEXT_LINES = """\
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(config["max_tokens"])
tokenizer.enable_padding(pad_id=config["pad_token_id"])
read = tokenizer.encode_batch({texts})
inputs = {{
    "input_ids": numpy.array([each.ids for each in read]),
    "attention_mask": numpy.array([each.attention_mask for each in read]),
}}
"""


def _readme(name: str, answer: OnnxOutput, chat: ChatFormat) -> str:
    """Return a README with a description of the files and example code."""
    tags = answer.takes_words
    lines = [
        f"# {name}",
        "",
        f"`{ONNX_FILE}` gives `{answer.name}` ({', '.join(answer.axes)}): {answer.meaning}. "
        f"`{ONNX_CONFIG}` says what goes in and what comes out, `config.json` describes the network.",
    ]
    if chat.media is not None:
        lines += ["", "Images and sounds are read as `preprocessor_config.json` says."]
        return "\n".join(lines) + "\n"
    if answer.takes_conversations and chat.template.kind == "chat":
        lines.append("Conversations are written by the chat template of the tokenizer first.")
    texts = '[["Anna", "lives", "here"], ["Yes"]]' if tags else '["One text.", "Another one"]'
    encoded = "texts, is_pretokenized=True" if tags else "texts"
    code = [
        "import json", "from pathlib import Path", "", "import numpy", "import onnxruntime",
        "from tokenizers import Tokenizer", "",
        "folder = Path()  # this one",
        f'config = json.loads((folder / "{ONNX_CONFIG}").read_text())', f"texts = {texts}",
        _TEXT_LINES.format(texts=encoded).rstrip(),
        f'session = onnxruntime.InferenceSession(str(folder / "{ONNX_FILE}"))',
        "(answer,) = session.run(None, inputs)",
        answer.code,
    ]  # fmt: skip
    return "\n".join([*lines, "", "```python", *code, "```"]) + "\n"
