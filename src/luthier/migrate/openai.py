"""Import of an OpenAI account as rows, graders and recipes.

OpenAI offers no export of an account. The API returns objects with their kind under ``object``, and
the import reads a folder of such objects under any file names. Source: OpenAI's API reference on
files, fine-tuning and evals, 2026.

- files for fine-tuning become rows, and jobs become recipes with these rows
- the criteria of an eval become graders, and the rows of its runs become rows
- replies that passed become rows with prompt and reply, for training another model
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import RecipeError, RowRefused
from luthier.graders import Answer
from luthier.migrate.files import MAX_BYTES, Import, NotConvertible, file_name, read_text
from luthier.server.http.messages import Fault
from luthier.server.openai.eval_runs import DataSource, parse_criteria
from luthier.server.openai.fine_tuning import (
    CreateJob,
    DpoHyperparameters,
    Hyperparameters,
    ReinforcementHyperparameters,
    settings_of,
)
from luthier.server.openai.graders import grader_fields
from luthier.server.openai.protocol import validate

_KINDS = ("file", "fine_tuning.job", "eval", "eval.run", "eval.run.output_item")
_LISTS = ("list", "page")
_HYPERPARAMETERS = (
    DpoHyperparameters.model_fields.keys() | ReinforcementHyperparameters.model_fields.keys()
) - Hyperparameters.model_fields.keys()
"""Hyperparameters with the same meaning in luthier. A job shows the remaining hyperparameters as
chosen for OpenAI's model."""
_PLACE = re.compile(r"\{\{\s*item\b")
_PYTHON = (
    '\n\n_grade = grade\n\n\ndef grade(sample, item):\n    return _grade(sample, item["item"])\n'
)


@dataclass
class _Export:
    """The objects of a folder by kind and id, and all other files by name."""

    objects: dict[str, dict[str, Mapping[str, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in _KINDS}
    )
    contents: dict[str, Path] = field(default_factory=dict)
    read: set[Path] = field(default_factory=set)
    """Contents that an object refers to."""

    def content_of(self, file_id: str | None) -> Path | None:
        """Return the content of a file by id or by the name of the upload."""
        file = self.objects["file"].get(str(file_id), {})
        names = (str(file_id), str(file.get("filename") or file_id))
        path = next((self.contents[name] for name in names if name in self.contents), None)
        if path is not None:
            self.read.add(path)
        return path


def convert(export: Path, result: Import, judge: str | None = None) -> None:
    """Convert the folder ``export`` into ``result``; see :func:`luthier.import_openai`."""
    if not export.is_dir():
        raise RecipeError(f"{export} is not a folder")
    objects = _read(export, result)
    if not any(objects.objects.values()):
        raise RecipeError(
            f"{export} has no OpenAI objects. Save lists of the API, such as client.evals.list(), as "
            ".json or .jsonl"
        )
    _Conversion(objects, result, judge).write()


def _read(folder: Path, result: Import) -> _Export:
    export = _Export()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".json" and path.stat().st_size > MAX_BYTES:
            size = f"larger than {MAX_BYTES >> 20} MiB. Write one object per line"
            result.skip(path.name, size)
            continue
        objects = list(_objects(path)) if path.suffix in (".json", ".jsonl") else []
        if not objects:
            export.contents[path.name] = path
            export.contents.setdefault(path.stem, path)
        for each in objects:
            export.objects[each["object"]][str(each["id"])] = each
    return export


def _objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the OpenAI objects of a file: a single object, a list or page, or one object per line."""
    for part in _lines(path) if path.suffix == ".jsonl" else [path.read_bytes()]:
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping) and value.get("object") in _LISTS:
            value = value.get("data")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping) and each.get("id") and str(each.get("object")) in _KINDS:
                yield each


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines, separated by line feeds only."""
    with path.open("rb") as file:
        while line := file.readline(MAX_BYTES):
            yield line


def _is_empty(path: Path) -> bool:
    """Return whether a file is empty or a list without objects."""
    with path.open("rb") as file:
        beginning = file.read(1000)
    try:
        value = json.loads(beginning or "[]")
    except ValueError:
        return False
    return not (value.get("data", value) if isinstance(value, Mapping) else value)


class _Conversion:
    def __init__(self, export: _Export, result: Import, judge: str | None) -> None:
        self.export, self.result, self.judge = export, result, judge
        self.taken: set[str] = set()
        self.rows_of: dict[str, str] = {}
        """Files of rows by OpenAI file id."""
        self.runs = _group_by(export.objects["eval.run"].values(), "eval_id")
        self.items = _group_by(export.objects["eval.run.output_item"].values(), "run_id")

    @contextmanager
    def _skip_errors(self, where: str) -> Iterator[None]:
        """Record why the block cannot convert an object, and continue after the block."""
        try:
            yield
        except (NotConvertible, Fault, RowRefused) as error:
            self.result.skip(where, str(error))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.result.skip(where, f"the object is malformed: {error!r:.200}")

    def write(self) -> None:
        objects = self.export.objects
        for kind, convert_one in (
            ("file", self._file), ("fine_tuning.job", self._job), ("eval", self._eval),
        ):  # fmt: skip
            for number, each in enumerate(objects[kind].values(), 1):
                with self._skip_errors(f"{kind} {each.get('id', number)}"):
                    convert_one(each)
        for run in objects["eval.run"].values():
            if str(run.get("eval_id")) not in objects["eval"]:
                self.result.skip(
                    f"eval.run {run['id']}", f"the eval {run.get('eval_id')} is missing"
                )
        for path in sorted({*self.export.contents.values()} - self.export.read):
            if path.suffix in (".json", ".jsonl") and not _is_empty(path):
                self.result.skip(
                    path.name,
                    "no known object, and no object refers to the file",
                )

    def _file(self, file: Mapping[str, Any]) -> None:
        if file.get("purpose") != "fine-tune":
            return  # the runs of an eval read the rows of the eval
        file_id, name = str(file["id"]), str(file.get("filename") or file["id"])
        path = self.export.content_of(file_id)
        if path is None:
            raise NotConvertible(f"the content is missing. Save the content as {file_id}.jsonl")
        target = file_name(Path(name).stem, self.taken, ".jsonl")
        self.rows_of[file_id] = target
        self.result.copy_rows(target, path, f"rows of {name}")

    def _job(self, job: Mapping[str, Any]) -> None:
        names = ("model", "training_file", "validation_file", "seed", "hyperparameters", "method")
        fields = {name: job[name] for name in names if job.get(name) is not None}
        user_fields, dropped = _split_choices(fields)
        parameters = validate(user_fields, CreateJob)
        train = self.rows_of.get(parameters.training_file)
        if train is None:
            raise NotConvertible(f"the rows {parameters.training_file} are missing")
        settings = settings_of(parameters, parameters.seed or 0, writes=True)
        if parameters.seed is None:
            del settings["training"]["seed"]
        objective = dict(settings.get("objective", {}))
        reinforcement = parameters.method and parameters.method.reinforcement
        if reinforcement:
            grader = grader_fields(reinforcement.grader, "method.reinforcement.grader", self._judge)
            objective = {"method": "grpo", **objective, "grader": grader}
        data = {"train": str(self.result.folder.absolute() / train)}
        if parameters.validation_file in self.rows_of:
            name = self.rows_of[str(parameters.validation_file)]
            data["validation"] = str(self.result.folder.absolute() / name)
        tuned = str(job.get("fine_tuned_model") or "")
        label = tuned.split(":")[3] if tuned.count(":") >= 4 else ""
        recipe = {"data": data, "objective": objective, "training": settings["training"]}
        recipe = {group: values for group, values in recipe.items() if values}
        target = file_name(f"tune {label or job['id']}", self.taken, ".toml")
        if dropped:
            self.result.remark(
                f"{target}: {', '.join(f'{name}={value}' for name, value in dropped.items())} were for "
                f"{parameters.model}; luthier chooses by the rows and your base model"
            )
        self.result.write_toml(
            target, recipe, f"recipe of the job {job['id']} ({parameters.model})",
            f"luthier tune {self.result.place(target)}",
        )  # fmt: skip

    def _judge(self, model: str, where: str) -> str:
        """Return the judge of a model grader."""
        if self.judge is None:
            self.result.remark(
                f"model graders query {model} at api.openai.com. Choose another model with --judge"
            )
        return self.judge or f"https://api.openai.com/v1#{model}"

    def _eval(self, eval_object: Mapping[str, Any]) -> None:
        title = str(eval_object.get("name") or eval_object["id"])
        tables: dict[str, dict[str, Any]] = {}
        for index, criterion in enumerate(eval_object.get("testing_criteria") or []):
            with self._skip_errors(f"eval {title!r}, criterion {index + 1}"):
                for name, table in self._table(criterion, index).items():
                    tables[name if name not in tables else f"{name}_{index + 1}"] = table
        runs = self.runs[str(eval_object["id"])]
        graders = None
        if tables:
            graders = file_name(f"{title} graders", self.taken, ".toml")
            self.result.write_toml(
                graders, tables, f"graders of the eval {title!r}: {', '.join(tables)}"
            )
        if not runs:
            self.result.skip(f"rows of the eval {title!r}", "the eval has no run with rows")
        written: dict[str, str] = {}
        for run in runs:
            with self._skip_errors(f"run {run['id']} of {title!r}"):
                self._run(run, title, graders, written)

    def _table(self, criterion_object: Any, index: int) -> dict[str, dict[str, Any]]:
        """Return the grader of a criterion. The grader returns 1 if a row passes."""
        if not isinstance(criterion_object, Mapping):
            return {}
        (criterion,) = parse_criteria([criterion_object], self._judge)
        fields = _nest_item(
            grader_fields(criterion_object, f"testing_criteria[{index}]", self._judge)
        )
        name = re.sub(r"\W+", "_", criterion.name.lower(), flags=re.ASCII).strip("_") or f"c{index}"
        if criterion_object["type"] not in ("string_check", "label_model"):
            fields = {
                "method": "multi", "calculate_output": f"score >= {criterion.threshold:g}",
                "graders": {"score": fields},
            }  # fmt: skip
        return {name: fields}

    def _run(
        self, run: Mapping[str, Any], title: str, graders: str | None, written: dict[str, str]
    ) -> None:
        items = self.items[str(run["id"])]
        counts = run.get("result_counts") or {}
        model = str(run.get("model") or "imported replies")
        self.result.results.append(
            f"{title}, run {run.get('name') or run['id']}: {model} passed "
            f"{counts.get('passed', 0):,} of {counts.get('total', 0):,}"
        )
        rows = list(self._rows(run, items))
        if rows:
            content = json.dumps(rows, sort_keys=True)
            if content not in written:
                written[content] = file_name(title, self.taken, ".jsonl")
                command = f"luthier evaluate MODEL {self.result.place(written[content])}"
                if graders:
                    command += f" --grader {self.result.place(graders)}"
                self.result.write_rows(
                    written[content], rows, f"of the eval {title!r}", command if graders else None
                )
        replies = [
            row for each in items if each.get("status") == "pass" for row in _answer_rows(each)
        ]
        if replies:
            name = file_name(f"{title} answers {model}", self.taken, ".jsonl")
            self.result.write_rows(
                name,
                replies,
                f"with replies of {model} that passed",
                f"luthier tune {self.result.place(name)}",
            )
        if not rows:
            raise NotConvertible("the run has neither prompts nor replies")

    def _rows(
        self, run: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the prompts of a run, from the data source or else from the output items."""
        data_source = {n: v for n, v in (run.get("data_source") or {}).items() if v is not None}
        source = (
            validate(data_source, DataSource, "data_source") if _known_source(data_source) else None
        )
        data_items = [] if source is None else self._items(data_source["source"])
        if data_items and source is not None and source.input_messages is not None:
            for number, item in enumerate(data_items, 1):
                answer = Answer((), "", None, PromptOnly("rows", number, "", members=item))
                yield _row(source.messages(answer), item)
            return
        for each in sorted(items, key=lambda each: int(each.get("datasource_item_id") or 0)):
            sample = each.get("sample") or {}
            if sample.get("input"):
                yield _row(sample["input"], each.get("datasource_item") or {})

    def _items(self, source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        rows = source.get("content") or []
        if source.get("type") == "file_id":
            path = self.export.content_of(source.get("id"))
            if path is None or path.stat().st_size > MAX_BYTES:
                return []
            rows = []
            for line in read_text(path).split("\n"):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except ValueError as error:
                        raise NotConvertible(f"{path.name} is not JSON Lines: {error}") from error
        return [row["item"] for row in rows if isinstance(row, Mapping) and "item" in row]


def _group_by(
    objects: Iterable[Mapping[str, Any]], name: str
) -> Mapping[str, list[Mapping[str, Any]]]:
    """Return objects grouped by the member ``name``, in order."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in objects:
        groups[str(each.get(name))].append(each)
    return groups


def _known_source(data_source: Mapping[str, Any]) -> bool:
    kind = (data_source.get("source") or {}).get("type")
    rows = (data_source.get("source") or {}).get("content")
    return kind == "file_id" or (kind == "file_content" and bool(rows))


def _split_choices(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the fields of a job into the user's choices and the values that OpenAI chose for its
    model.

    Settings without an equivalent count as OpenAI's choices.
    """
    dropped: dict[str, Any] = {}

    def clean(
        values: Mapping[str, Any], known: Collection[str] = _HYPERPARAMETERS
    ) -> dict[str, Any]:
        dropped.update(
            {n: v for n, v in values.items() if n not in known and v not in (None, "auto")}
        )
        return {n: v for n, v in values.items() if n in known and v is not None}

    user_fields = {name: value for name, value in fields.items() if name != "hyperparameters"}
    clean(fields.get("hyperparameters") or {})
    method = fields.get("method")
    if isinstance(method, Mapping) and isinstance(
        settings := method.get(str(method.get("type"))), Mapping
    ):
        method_fields = clean(settings, ("grader", "hyperparameters"))
        method_fields["hyperparameters"] = clean(settings.get("hyperparameters") or {})
        user_fields["method"] = {"type": method["type"], method["type"]: method_fields}
    return user_fields, dropped


def _nest_item(value: Any) -> Any:
    """Return grader fields for rows that store the item under ``item``, whatever the members of the
    item."""
    if isinstance(value, str):
        return _PLACE.sub("{{item.item", value)
    if isinstance(value, Mapping):
        fields = {name: _nest_item(each) for name, each in value.items()}
        if fields.get("method") == "python":
            fields["source"] = str(value["source"]).rstrip() + _PYTHON
        return fields
    return [_nest_item(each) for each in value] if isinstance(value, (list, tuple)) else value


def _row(messages: Sequence[Mapping[str, Any]], item: Mapping[str, Any]) -> dict[str, Any]:
    return {**_prompt_row(messages), "item": dict(item)}


def _prompt_row(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    turns = [
        {
            "role": "system" if each["role"] == "developer" else each["role"],
            "content": each["content"],
        }
        for each in messages
        if isinstance(each.get("content"), str) and isinstance(each.get("role"), str)
    ]
    if len(turns) != len(messages) or not turns:
        raise NotConvertible("messages must have text contents")
    return {"messages": turns}


def _answer_rows(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sample = item.get("sample") or {}
    replies = [each for each in sample.get("output") or [] if isinstance(each.get("content"), str)]
    if sample.get("input") and replies:
        turns = _prompt_row(sample["input"])["messages"]
        yield {"messages": [*turns, {"role": "assistant", "content": replies[-1]["content"]}]}
