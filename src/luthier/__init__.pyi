# Written by `make docs` from the functions of the commands.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from luthier.cli.documents import FoundPassages, IndexSummary
from luthier.cli.inference.predict import Predictions
from luthier.cli.model import Model as Model
from luthier.cli.model import load as load
from luthier.cli.models.samples import TrainingSamples
from luthier.cli.pipeline import PipelineResult
from luthier.data.convert import Conversion
from luthier.data.in_memory import Rows
from luthier.documents.answers import DocumentAnswer
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Result
from luthier.errors import DataError as DataError
from luthier.errors import Diverged as Diverged
from luthier.errors import DoesNotFit as DoesNotFit
from luthier.errors import DownloadError as DownloadError
from luthier.errors import GradingFailed as GradingFailed
from luthier.errors import Interrupted as Interrupted
from luthier.errors import LuthierError as LuthierError
from luthier.errors import OutOfMemory as OutOfMemory
from luthier.errors import RecipeError as RecipeError
from luthier.errors import RefusedInput as RefusedInput
from luthier.errors import RunConflict as RunConflict
from luthier.errors import UnknownModel as UnknownModel
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.judges import JudgeAgreement
from luthier.exports.export import Export
from luthier.exports.hub import Push
from luthier.gate.clean import CleaningSummary
from luthier.gate.report import Report
from luthier.graders import Spec
from luthier.library.models import StoredModel
from luthier.media.cutting import Cut
from luthier.migrate.files import Import
from luthier.recipe import Recipe as Recipe
from luthier.workflows.advise.recommend import Advice
from luthier.workflows.certificate.certificate import Certificate
from luthier.workflows.certificate.verify import Verification
from luthier.workflows.compare import HeadToHead
from luthier.workflows.distil.responses import Distilled
from luthier.workflows.earlier_task import MetricChanges
from luthier.workflows.estimate.estimate import Estimate
from luthier.workflows.hard_negatives import MinedNegatives
from luthier.workflows.safety import Safety
from luthier.workflows.student import Student
from luthier.workflows.study.results import Study

__version__: str

def advise(
    data: str | Path | Rows,
    *,
    documents: Sequence[str | Path] = (),
    goal: Literal["quality", "cost", "latency", "knowledge", "style"] = "quality",
    max_minutes: float | None = None,
    max_seconds: float | None = None,
    max_megabytes: float | None = None,
    trial: float = 60.0,
    recipe: Path | str | None = None,
    reporter: Reporter | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    chat_template: str | Path | None = None,
    base: str | None = None,
    name: str | None = None,
    objective: str | Mapping[str, Any] | None = None,
    threshold: list[str] | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    track: list[str] | None = None,
    **fields: Any,
) -> Advice: ...
def ask(
    model: str,
    question: str,
    *,
    index: str,
    top: int | None = None,
    max_tokens: int = 256,
    reranker: str | None = None,
) -> DocumentAnswer: ...
def certificate(
    model: str | Model | StoredModel,
    *,
    watts: float | None = None,
    card: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Certificate: ...
def clean(
    source: str | Path | Rows,
    target: Path | str,
    *,
    normalize: bool = False,
    merge_labels: bool = False,
    redact: Sequence[str] = (),
    drop: Sequence[str] = (),
    dedupe: Literal["exact", "near"] | None = None,
    plan: Path | str | None = None,
    base: str | None = None,
    objective: str | None = None,
    validation: str | Path | Rows | None = None,
    test: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> CleaningSummary: ...
def compare(
    data: str | Path | Rows,
    tuned: Sequence[str],
    *,
    base: str | None = None,
    train: str | Path | Rows | None = None,
    documents: Sequence[str | Path] = (),
    index: str | None = None,
    prompt: Sequence[Path] = (),
    rival: Sequence[str] = (),
    graders: Sequence[Spec] | Mapping[str, Spec] | None = None,
    grader_settings: Mapping[str, Any] | None = None,
    max_tokens: int = 64,
    prices: Path | str | None = None,
    encoder: str | None = None,
    judge: Spec | None = None,
    show: int = 0,
    seeds: int = 0,
    per_month: int | None = None,
    paraphrases: str | None = None,
    html: Path | str | None = None,
    figure: Path | str | None = None,
    attach: bool = False,
    columns: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> HeadToHead: ...
def convert(
    source: str | Path | Rows,
    target: Path | str,
    *,
    to: str = "rows",
    format: Literal["jsonl", "json", "csv", "tsv", "parquet"] | None = None,
    columns: Mapping[str, str] | None = None,
    drop_extra_keys: bool = False,
    mine_negatives: int | None = None,
    corpus: str | Path | Rows | None = None,
    model: str | None = None,
    margin: float = 0.05,
    index: str | None = None,
    seconds: float | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion | MinedNegatives | Cut: ...
def distil(
    prompts: str | Path | Rows | None = None,
    *,
    documents: Sequence[str | Path] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
    teacher: str | Mapping[str, Any] | None = None,
    student: str | None = None,
    method: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    grader: str | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    **fields: Any,
) -> Distilled: ...
def estimate(
    data: str | Path | Rows | Recipe,
    *,
    finish_by: str | None = None,
    within: float | None = None,
    prices: Path | str | None = None,
    per_month: int | None = None,
    reporter: Reporter | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    chat_template: str | Path | None = None,
    base: str | None = None,
    name: str | None = None,
    objective: str | Mapping[str, Any] | None = None,
    threshold: list[str] | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    track: list[str] | None = None,
    **fields: Any,
) -> Estimate: ...
def evaluate(
    model: str | Model | StoredModel,
    data: str | Path | Rows,
    *,
    graders: Sequence[Spec] | Mapping[str, Spec] | None = None,
    grader_settings: Mapping[str, Any] | None = None,
    on_grader_error: Literal["fail", "zero"] = "fail",
    max_tokens: int = 128,
    output: Path | str | None = None,
    turns: Literal["last", "calls", "all"] = "last",
    slices: Sequence[str] = (),
    html: Path | str | None = None,
    figure: Path | str | None = None,
    attach: bool = False,
    columns: Mapping[str, str] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    corpus: str | Path | Rows | None = None,
    qrels: Path | str | None = None,
    reranker: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation: ...
def export(
    model: str | Model | StoredModel,
    folder: Path | str,
    *,
    format: Literal["safetensors", "onnx", "gguf"] = "safetensors",
    merged: bool | None = None,
    quantization: str | None = None,
    data: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> Export: ...
def forgetting(
    model: str,
    *,
    base: str | None = None,
    rows: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    probes: Sequence[str | Path] = (),
    html: Path | str | None = None,
    attach: bool = False,
    reporter: Reporter | None = None,
) -> MetricChanges: ...
def import_openai(
    export: str | Path, folder: str | Path = "imported", *, judge: str | None = None
) -> Import: ...
def index_documents(
    sources: Sequence[str | Path],
    *,
    name: str,
    model: str | None = None,
    watch: bool = False,
    reporter: Reporter | None = None,
) -> IndexSummary: ...
def inspect(
    data: str | Path | Rows,
    *,
    validation: str | Path | Rows | None = None,
    test: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    base: str | None = "auto",
    objective: str | Mapping[str, object] | None = None,
    chat_template: str | Path | None = None,
    rows: int | None = None,
    html: Path | str | None = None,
    severity: Mapping[str, str] | None = None,
    policy: Path | str | None = None,
    skip: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Report: ...
def judge(
    data: str | Path | Rows,
    judge: Spec,
    *,
    human: str = "chosen",
    columns: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> JudgeAgreement: ...
def launch(
    data: str | Path | Rows | Recipe,
    *,
    on: Literal["slurm", "kubernetes", "skypilot", "ray"],
    processes: int = 1,
    nodes: int = 1,
    gpu: str | None = None,
    image: str | None = None,
    time: float | None = None,
    output: Path | str | None = None,
    reporter: Reporter | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    chat_template: str | Path | None = None,
    base: str | None = None,
    name: str | None = None,
    objective: str | Mapping[str, Any] | None = None,
    threshold: list[str] | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    track: list[str] | None = None,
    **fields: Any,
) -> str: ...
def list_models(*, database: str | None = None) -> dict[str, Any]: ...
def pipeline(
    file: Path | str, *, check: bool = False, reporter: Reporter | None = None
) -> PipelineResult: ...
def predict(
    model: str,
    text: str | Sequence[str] | Rows | None = None,
    *,
    input: str | Path | Rows | None = None,
    output: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
    top: int | None = None,
    least_certain: int | None = None,
    explain: bool = False,
    html: Path | str | None = None,
    overwrite: bool = False,
    processes: int | None = None,
    ray_address: str | None = None,
    ray_gpus: float = 0.0,
    reporter: Reporter | None = None,
) -> Predictions: ...
def pretrain(
    data: str | Path | Rows | Sequence[str | Path],
    *,
    resume: bool = False,
    processes: int = 1,
    reporter: Reporter | None = None,
    name: str | None = None,
    size: str | None = None,
    base: str | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    family: str | None = None,
    config: Path | None = None,
    vocabulary: int | None = None,
    context: int | None = None,
    validation: str | Path | Rows | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    **fields: Any,
) -> Result: ...
def push(
    model: str | Model | StoredModel,
    to: str,
    *,
    format: Literal["safetensors", "onnx", "gguf"] = "safetensors",
    merged: bool | None = None,
    quantization: str | None = None,
    public: bool = False,
    reporter: Reporter | None = None,
) -> Push: ...
def remove_model(
    model: str, *, force: bool = False, database: str | None = None
) -> dict[str, Any]: ...
def safety(
    model: str,
    *,
    base: str | None = None,
    train: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    attach: bool = False,
    reporter: Reporter | None = None,
) -> Safety: ...
def samples(
    run: str, *, count: int = 20, last: int = 20, worst_first: bool = False, full: bool = False
) -> TrainingSamples: ...
def search_documents(
    name: str, question: str, *, top: int = 5, reranker: str | None = None
) -> FoundPassages: ...
def split(
    source: str | Path | Rows,
    output: Path | str,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]: ...
def student(
    teacher: str,
    *,
    name: str,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    heads: int | None = None,
    intermediate: int | None = None,
    hidden: int | None = None,
    reporter: Reporter | None = None,
) -> Student: ...
def study(
    data: str | Path | Rows | Recipe,
    *,
    vary: Sequence[str] = (),
    preset: str | None = None,
    seeds: int = 1,
    forgetting: bool = False,
    earlier: Path | str | None = None,
    at_most: Sequence[str] = (),
    max_minutes: float | None = None,
    search: int | None = None,
    parallel: int | None = None,
    ray_address: str | None = None,
    ray_gpus: float = 0.0,
    html: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    chat_template: str | Path | None = None,
    base: str | None = None,
    name: str | None = None,
    objective: str | Mapping[str, Any] | None = None,
    threshold: list[str] | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    track: list[str] | None = None,
    **fields: Any,
) -> Study: ...
def tune(
    data: str | Path | Rows | Recipe,
    *,
    resume: bool = False,
    processes: int = 1,
    max_minutes: float | None = None,
    max_cost: float | None = None,
    prices: Path | str | None = None,
    check_forgetting: bool = False,
    accept_forgetting: bool = False,
    reporter: Reporter | None = None,
    validation: str | Path | Rows | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    chat_template: str | Path | None = None,
    base: str | None = None,
    name: str | None = None,
    objective: str | Mapping[str, Any] | None = None,
    threshold: list[str] | None = None,
    adaptation: str | Mapping[str, Any] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    track: list[str] | None = None,
    **fields: Any,
) -> Result: ...
def verify(model: str | Model | StoredModel) -> Verification: ...
