"""``--processes`` and ``--ray-address`` of the commands that answer the rows of a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.console import extra, heavy_imports, note
from luthier.errors import RecipeError, RefusedInput

if TYPE_CHECKING:
    from luthier.workflows.batch_inference import FileAnswers, InferenceRunner
    from luthier.workflows.inference_tasks import InferenceTask


@dataclass(frozen=True)
class BatchInference:
    """Processes that are to answer the rows of a file."""

    output: Path
    processes: int | None
    ray_address: str | None
    ray_gpus: float

    @staticmethod
    def of_options(
        source: str | Path | None,
        output: Path | None,
        processes: int | None,
        ray_address: str | None,
        ray_gpus: float,
    ) -> BatchInference | None:
        """What was asked for; ``None`` where the command itself is to answer.

        Raises:
            RefusedInput: for options that do not go together.
        """
        if ray_gpus and ray_address is None:
            raise RefusedInput(
                "--ray-gpus says what processes reserve on a cluster: give --ray-address"
            )
        if processes is None and ray_address is None:
            return None
        if source is None or output is None:
            raise RecipeError(
                "--processes and --ray-address share the rows of a file, and write one: give --input "
                "and --output"
            )
        return BatchInference(output, processes, ray_address, ray_gpus)

    def answer(self, task: InferenceTask) -> tuple[FileAnswers, dict[str, Any]]:
        """Have the rows of ``task`` answered, and show how that goes; what came of it, also as JSON."""
        with heavy_imports():
            from luthier.cli.progress import show_progress
            from luthier.engine.metrics import Reporter
            from luthier.workflows.batch_inference import answer_file

        runner: InferenceRunner | None = None
        if self.ray_address is not None:
            with extra("server"):
                from luthier.cluster.ray_commands import RayInferenceRunner

            runner = RayInferenceRunner(self.ray_address, self.ray_gpus)
        with show_progress(0, task.kind, rate="rows/s") as show:

            class Shown(Reporter):
                def note(self, text: str) -> None:
                    note(text)

                def progress(self, done: int, total: int, what: str) -> None:
                    show(done, total)

            answers = answer_file(task, self.output, self.processes, runner, Shown())
        report = asdict(answers)
        del report["counts"]
        return answers, {"model": task.model, **report, "output": str(self.output)}
