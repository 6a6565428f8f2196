"""The tools of ``luthier mcp``, named for agents, on the commands of luthier.

Each tool answers within five seconds and 8 kB: clients end a call after a minute, and an answer
fills the context of a model. Longer work goes on as a job. The text of an
answer is for the model, the structured content for the program around the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult
from pydantic import Field

from luthier.cli.mcp import jobs
from luthier.library.folders import is_base_here
from luthier.library.models import custom_models, pretrained_models
from luthier.models.catalog import CATALOG
from luthier.server.agent_tools import WAIT_SECONDS, Columns, answer, short_values, tool_server

_SHOWN_JOBS = 10
_SETTINGS = ("training.", "adaptation.")
"""Parts of the recipe without paths of files."""
_SETTABLE = "fields of training and adaptation, and the name of an objective"

INSTRUCTIONS = """\
luthier tunes models on this machine with the user's own rows. Order: inspect the rows, clean them
if it names faults, tune, then compare the model with its base on rows that were not trained on.
Report the verdict as printed, also if it says that the model did not learn or that a cheaper
method is as good. A tool that takes longer than a few seconds returns the id of a job: call job
with this id until its state is completed or failed.
"""

File = Annotated[str, Field(description="File or folder of rows, relative to the first folder.")]
ModelId = Annotated[str, Field(description="Id of a base or custom model.")]


def build_server(folders: Sequence[Path]) -> MCPServer:
    """Return the server; tools read and write rows in ``folders`` only."""
    tools = _Tools([folder.resolve() for folder in folders])
    return tool_server(
        INSTRUCTIONS,
        [tools.inspect, tools.evaluate, tools.compare, tools.predict, tools.generate, tools.search],
        [tools.clean, tools.tune, tools.job, tools.examples],
    )


class _Tools:
    """The tools. An agent reads docstrings and signatures."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def inspect(self, data: File, columns: Columns = None) -> CallToolResult:
        """Check rows before a training: kind, counts, and each fault with row and fix."""
        return self._run("inspect", data=self._existing(data), columns=columns)

    def clean(
        self,
        data: File,
        target: Annotated[str, Field(description="New file for the cleaned rows.")],
        columns: Columns = None,
        drop: Annotated[
            list[str] | None, Field(description="Rules whose rows are dropped, as inspect names.")
        ] = None,
        dedupe: Literal["exact", "near"] | None = None,
        merge_labels: bool = False,
    ) -> CallToolResult:
        """Write a cleaned copy of rows; the original stays."""
        return self._run(
            "clean", source=self._existing(data), target=self._inside(target), columns=columns,
            drop=drop or [], dedupe=dedupe, merge_labels=merge_labels,
        )  # fmt: skip

    def tune(
        self,
        data: File,
        name: Annotated[str, Field(description="Name of the new model.")],
        base: Annotated[str | None, Field(description="Base model; chosen by the rows.")] = None,
        validation: Annotated[str | None, Field(description="File of held-out rows.")] = None,
        columns: Columns = None,
        max_minutes: Annotated[float | None, Field(description="Reject a longer run.")] = None,
        resume: Annotated[bool, Field(description="Go on with an interrupted run.")] = False,
        settings: Annotated[
            dict[str, Any] | None,
            Field(description='Fields of the recipe, such as {"training.epochs": 2}.'),
        ] = None,
    ) -> CallToolResult:
        """Tune a model on rows. The defaults fit the rows; the verdict names the gain."""
        for field, value in (settings or {}).items():
            # An objective with fields may name a judge at an address, or a file of a grader.
            is_plain = field == "objective" and isinstance(value, str)
            if not is_plain and not field.startswith(_SETTINGS):
                raise ToolError(f'"{field}" cannot be set: only {_SETTABLE}')
        return self._run(
            "tune", data=self._existing(data), name=name, base=self._model(base), resume=resume,
            validation=validation and self._existing(validation), columns=columns,
            max_minutes=max_minutes, **(settings or {}),
        )  # fmt: skip

    def evaluate(self, model: ModelId, data: File, columns: Columns = None) -> CallToolResult:
        """Score a model on test rows, with intervals."""
        return self._run(
            "evaluate", model=self._model(model), data=self._existing(data), columns=columns
        )

    def compare(
        self,
        models: Annotated[list[str], Field(description="Custom models.")],
        data: File,
        base: Annotated[str | None, Field(description="Rival; the base of the models.")] = None,
        columns: Columns = None,
    ) -> CallToolResult:
        """Compare custom models with their base on the same test rows, and name the winner."""
        return self._run(
            "compare", data=self._existing(data), tuned=[self._model(each) for each in models],
            base=self._model(base), columns=columns,
        )  # fmt: skip

    def predict(
        self, model: ModelId, texts: Annotated[list[str], Field(max_length=40)]
    ) -> CallToolResult:
        """Predict labels, ratings or tags of texts: a line for each text, in order."""
        return self._run("predict", model=self._model(model), input=texts, top=1)

    def generate(
        self,
        model: ModelId,
        prompt: str,
        system: str | None = None,
        max_tokens: Annotated[int, Field(ge=1, le=1_000)] = 256,
    ) -> CallToolResult:
        """Generate a reply to a prompt."""
        return self._run(
            "generate", model=self._model(model), prompt=prompt, system=system,
            max_tokens=max_tokens,
        )  # fmt: skip

    def search(
        self,
        query: str,
        index: Annotated[str | None, Field(description="Index of `luthier index add`.")] = None,
        data: Annotated[str | None, Field(description="File of rows, with model.")] = None,
        model: Annotated[str | None, Field(description="Embedding model for data.")] = None,
        top: Annotated[int, Field(ge=1, le=20)] = 5,
    ) -> CallToolResult:
        """Find passages of an index of documents, or the rows of a file with the same meaning."""
        if index is not None:
            return self._run("search", name=index, question=query, top=top)
        if data is None or model is None:
            raise ToolError("name an index, or rows (data) and an embedding model (model)")
        return self._run(
            "nearest", model=self._model(model), data=self._existing(data),
            query=self._query(query), top=top,
        )  # fmt: skip

    def job(
        self,
        id: Annotated[str | None, Field(description="Job; all are listed without it.")] = None,
        cancel: Annotated[bool, Field(description="Interrupt the job.")] = False,
    ) -> CallToolResult:
        """Wait some seconds for a job and return its state, or list the jobs and the models."""
        known = jobs.recent()
        if id is None:
            shown = [{"job": each.id, "state": each.state} for each in known[:_SHOWN_JOBS]]
            models = [each.id for each in (*custom_models(), *pretrained_models())]
            models += filter(is_base_here, CATALOG)
            lines = [f"{len(known)} jobs, newest first"]
            lines += [f"{each['job']}: {each['state']}" for each in shown]
            return answer("\n".join([*lines, f"models: {', '.join(models)}"]),
                           {"jobs": shown, "models": models})  # fmt: skip
        found = next((each for each in known if each.id == id), None)
        if found is None:
            raise ToolError(f'there is no job "{id}". Call job without an id for a list')
        if cancel:
            found.cancel()
        return _job_answer(found)

    def examples(
        self,
        name: Annotated[str | None, Field(description="Use case whose rows are written.")] = None,
        folder: Annotated[str, Field(description="New folder for the rows.")] = "rows",
    ) -> CallToolResult:
        """List use cases with measured results, or write the sample rows of a use case."""
        target = None if name is None else self._inside(folder)
        return self._run("examples", name=name, folder=target)

    def _run(self, command: str, **arguments: Any) -> CallToolResult:
        given = {name: value for name, value in arguments.items() if value is not None}
        return _job_answer(jobs.start(command, given))

    def _inside(self, path: str) -> str:
        """Return the absolute path of a file or folder below the configured folders."""
        found = (self._folders[0] / path).resolve()
        if not any(found.is_relative_to(each) for each in self._folders):
            folders = ", ".join(map(str, self._folders))
            raise ToolError(f'"{path}" is outside the folders of this server: {folders}')
        return str(found)

    def _existing(self, path: str) -> str:
        found = self._inside(path)
        if not Path(found).exists():
            raise ToolError(f'"{path}" does not exist in {self._folders[0]}')
        return found

    def _query(self, query: str) -> str:
        """Return a text unchanged, and the path of an image or sound if the path is inside."""
        try:
            is_path = Path(query).exists() or (self._folders[0] / query).exists()
        except OSError:  # too long for a path
            is_path = False
        return self._existing(query) if is_path else query

    def _model(self, model: str | None) -> str | None:
        """Return an id unchanged, and the path of a folder if the path is inside."""
        is_path = model is not None and (model.startswith((".", "/", "~")) or Path(model).exists())
        return self._existing(model) if model is not None and is_path else model


def _job_answer(job: jobs.CommandJob) -> CallToolResult:
    """Return the state of a job after a moment, with the result of an ended job."""
    job.wait(WAIT_SECONDS)
    state, values = job.state, {"job": job.id, "state": job.state}
    if state == "running":
        text = f"Job {job.id} is running. Call job with this id.\n{job.messages()}"
        return answer(text, values)
    if state == "failed":
        text = job.messages() or "the process ended without a message"
        return answer(f"Job {job.id} has failed.\n{text}", values, is_error=True)
    values["file"] = str(job.folder / "result.json")
    result = job.result if isinstance(job.result, dict) else {"result": job.result}
    values |= short_values(result)
    return answer(job.output(), values)
