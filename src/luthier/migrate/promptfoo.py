"""Import of a promptfoo configuration as rows and graders: prompts, tests and assertions.

Each prompt becomes a file of rows, with one row per test and choice of variables. Tests with equal
kinds of assertions share a file of rows and a file of graders. The expected values of assertions
are stored in the row, under ``assert``. Source: promptfoo's configuration reference and its pages
on test cases and expected outputs, 2026.

Parts that need promptfoo are not imported: JavaScript, providers, transforms, red teaming, limits
of cost and latency, and metrics on a retrieved context. Jinja2's sandbox renders the templates,
because Nunjucks is modelled on Jinja2.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from luthier.data.read import read_records
from luthier.errors import DataError, Problem, RecipeError
from luthier.migrate.assertions import (
    JUDGED,
    SIMILARITIES,
    UNSUPPORTED,
    Checks,
    parse_judge,
)
from luthier.migrate.files import (
    YAML_ENDINGS,
    Import,
    NotConvertible,
    file_name,
    parse_number,
    parse_yaml,
    read_text,
)
from luthier.types import map_texts

_CHAT_ROLES = ("system", "user", "assistant")
_EXPECTED = re.compile(
    r"\s*(not-)?([a-z][a-z0-9-]*)(?:\(([0-9.eE+-]+)\))?\s*(?::\s*(.*))?", re.DOTALL
)
_WITHOUT_VALUE = ("is-json", "contains-json", "is-refusal")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")


@dataclass(frozen=True)
class _Prompt:
    label: str
    template: str | list[Any]
    """A text, or messages with text contents."""


@dataclass(frozen=True)
class _Test:
    where: str
    vars: Mapping[str, Any]
    asserts: Sequence[Any]
    threshold: float | None
    prefix: str
    suffix: str
    beside: Mapping[str, Any]
    """Description and metadata of the test."""
    judge: str | None


def convert(config: Path, result: Import, judge: str | None = None) -> None:
    """Convert ``config`` into ``result``; see :func:`..import_promptfoo`."""
    try:
        _Configuration(config, result, judge).write()
    except NotConvertible as error:
        raise RecipeError(f"{config}: {error}") from error
    except (AttributeError, KeyError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise RecipeError(f"{config} has an invalid part: {error}") from error


class _Configuration:
    def __init__(self, path: Path, result: Import, judge: str | None) -> None:
        self.path, self.result, self.judge = path, result, judge
        self.fields = self._fields()
        self.default = self._default()
        self.embeds = False
        self.without: dict[str, dict[str, None]] = {}
        """Names of the tests that lack a variable, in order, by variable."""

    def write(self) -> None:
        prompts, labels = list[_Prompt](), Counter[str]()
        for each in self._prompts():
            labels[each.label] += 1
            number = labels[each.label]
            prompts.append(replace(each, label=f"{each.label} ({number})") if number > 1 else each)
        if not prompts:
            raise RecipeError(f"{self.path}: no prompt can be imported; {self._reasons()}")
        tests = list(self._tests())
        files: dict[tuple[str, str], list[dict[str, Any]]] = {}
        tables: dict[str, dict[str, dict[str, Any]]] = {}
        count = 0
        for prompt in prompts:
            for test in tests:
                for filled in self._rows_of_test(prompt, test):
                    row, graders = filled
                    signature = json.dumps(graders, sort_keys=True)
                    tables[signature] = graders
                    files.setdefault((prompt.label, signature), []).append(row)
                    count += 1
        if not count:
            raise RecipeError(f"{self.path}: no test can be imported; {self._reasons()}")
        self._note_the_rest()
        self._write_files(files, tables)

    def _write_files(
        self,
        files: Mapping[tuple[str, str], list[dict[str, Any]]],
        tables: Mapping[str, dict[str, dict[str, Any]]],
    ) -> None:
        # A file of rows has the number of the graders that belong to it.
        numbers = {each: f" {n}" if len(tables) > 1 else "" for n, each in enumerate(tables, 1)}
        used: set[str] = set()
        graders: dict[str, str] = {}
        for signature, checks in tables.items():
            if checks:
                graders[signature] = file_name(f"graders{numbers[signature]}", used, ".toml")
                self.result.write_toml(graders[signature], checks, f"graders: {', '.join(checks)}")
        for (label, signature), rows in files.items():
            name = file_name(f"{label}{numbers[signature]}", used, ".jsonl")
            command = None
            if signature in graders:
                command = (
                    f"luthier evaluate MODEL {self.result.place(name)} "
                    f"--grader {self.result.place(graders[signature])}"
                )
            self.result.write_rows(name, rows, f"of the prompt {label!r}", command)

    def _fields(self) -> Mapping[str, Any]:
        fields = parse_yaml(read_text(self.path), str(self.path))
        if not isinstance(fields, Mapping) or not fields.keys() & {"prompts", "tests", "scenarios"}:
            raise RecipeError(f"{self.path} is not a promptfoo configuration: no prompts, no tests")
        return fields

    def _default(self) -> Mapping[str, Any]:
        default = self.fields.get("defaultTest") or {}
        if isinstance(default, str):
            default = parse_yaml(self._read(default.removeprefix("file://")), default)
        return default if isinstance(default, Mapping) else {}

    def _file(self, name: str) -> Path:
        folder = self.path.parent.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise NotConvertible(f"{name} is outside the folder of {self.path.name}")
        if not path.is_file():
            raise NotConvertible(f"{name} is missing")
        return path

    def _read(self, name: str) -> str:
        try:
            return read_text(self._file(name))
        except RecipeError as error:
            raise NotConvertible(str(error)) from error

    def _prompts(self) -> Iterator[_Prompt]:
        prompts = self.fields.get("prompts", ["{{prompt}}"])
        for number, each in enumerate(prompts if isinstance(prompts, list) else [prompts], 1):
            where, label = f"prompt {number}", None
            if isinstance(each, Mapping):
                label, each = each.get("label"), each.get("raw") or each.get("id")
            try:
                if not isinstance(each, str):
                    raise NotConvertible("the prompt is neither text nor a file")
                yield from self._prompt(each, label, where)
            except NotConvertible as error:
                self.result.skip(where, str(error))

    def _prompt(self, prompt: str, label: Any, where: str) -> Iterator[_Prompt]:
        prompt = prompt.strip() if prompt.strip().startswith("file://") else prompt
        is_path = re.fullmatch(r"[^\s{}]+\.(txt|md|j2|json|ya?ml|csv|tsv)", prompt) is not None
        if re.match(r"(exec|langfuse|portkey|helicone)(:|://)", prompt) or re.fullmatch(
            r"[^\s{}]+\.(js|cjs|mjs|ts|py|sh|rb)(:\w+)?", prompt
        ):
            raise NotConvertible(f"{prompt}: generated prompts are not supported")
        if not prompt.startswith("file://") and not is_path:
            yield _Prompt(str(label or where), _messages(prompt) or prompt)
            return
        for each in self._names(prompt.removeprefix("file://")):
            title = str(label or Path(each).stem)
            if Path(each).suffix in (".csv", ".tsv"):
                for row in self._records(each):
                    yield _Prompt(str(row.get("label") or title), str(row.get("prompt", "")))
                continue
            text = self._read(each)
            if Path(each).suffix in YAML_ENDINGS:
                yield _Prompt(title, _messages(text) or text)
                continue
            parts = [
                part for part in re.split(r"^---\s*$", text, flags=re.MULTILINE) if part.strip()
            ]
            for number, part in enumerate(parts, 1):
                yield _Prompt(f"{title} {number}" if len(parts) > 1 else title, part.strip())

    def _names(self, pattern: str) -> list[str]:
        """Return the name of a file, or the names in the folder that match a pattern."""
        if not re.search(r"[*?\[]", pattern):
            return [pattern]
        folder = self.path.parent
        try:
            paths = sorted(folder.glob(pattern))
            names = [str(path.relative_to(folder)) for path in paths if ".." not in path.parts]
        except (NotImplementedError, ValueError, OSError) as error:
            raise NotConvertible(f"{pattern}: {error}") from error
        if not names:
            raise NotConvertible(f"no file matches {pattern}")
        return names

    def _records(self, name: str) -> list[Mapping[str, Any]]:
        problems: list[Problem] = []
        records: list[Mapping[str, Any]] = [
            record for _, record in read_records(self._file(name), problems)
        ]
        if problems:
            raise RecipeError(str(DataError(problems)))
        return records

    def _tests(self) -> Iterator[_Test]:
        yield from self._inline_tests(self.fields.get("tests", []), "test")
        for number, scenario in enumerate(self.fields.get("scenarios") or [], 1):
            where = f"scenario {number}"
            if not isinstance(scenario, Mapping):
                self.result.skip(where, "only inline scenarios are supported")
                continue
            configs = scenario.get("config") or [{}]
            tests = scenario.get("tests") or [{}]
            for config, test in itertools.product(configs, tests):
                if not isinstance(config, Mapping) or not isinstance(test, Mapping):
                    self.result.skip(where, "only inline configs and tests are supported")
                    continue
                joined = {
                    **config,
                    **test,
                    "vars": {**(config.get("vars") or {}), **(test.get("vars") or {})},
                    "assert": [*(config.get("assert") or []), *(test.get("assert") or [])],
                    "metadata": {**(config.get("metadata") or {}), **(test.get("metadata") or {})},
                }
                yield from self._inline_tests([joined], where)

    def _inline_tests(self, tests: Any, where: str) -> Iterator[_Test]:
        for number, each in enumerate(tests if isinstance(tests, list) else [tests], 1):
            location = f"{where} {number}"
            try:
                if isinstance(each, str):
                    yield from self._tests_of_file(each)
                elif isinstance(each, Mapping) and "path" in each and "vars" not in each:
                    raise NotConvertible("generated tests are not supported")
                elif isinstance(each, Mapping):
                    yield self._test(each, location)
                else:
                    raise NotConvertible("a test must be an object or a file name")
            except NotConvertible as error:
                self.result.skip(location, str(error))

    def _tests_of_file(self, reference: str) -> Iterator[_Test]:
        name = reference.removeprefix("file://")
        if re.match(r"(https?|huggingface|s3|az)://", name):
            raise NotConvertible(f"{name}: downloads are not supported. Save the file first")
        if re.search(r"\.(py|js|cjs|mjs|ts)(:\w+)?$", name):
            raise NotConvertible(f"{name}: generated tests are not supported")
        for each in self._names(name):
            if Path(each).suffix in _TABLES:
                for line, record in enumerate(self._records(each), 1):
                    test = (
                        record if "vars" in record or "assert" in record else _parse_columns(record)
                    )
                    location = f"{each} row {line}"
                    try:
                        yield self._test(test, location)
                    except NotConvertible as error:
                        self.result.skip(location, str(error))
                continue
            found_tests = parse_yaml(self._read(each), each)
            yield from self._inline_tests(found_tests, each)

    def _test(self, test: Mapping[str, Any], where: str) -> _Test:
        options = {**(self.default.get("options") or {}), **(test.get("options") or {})}
        for name in ("transform", "postprocess", "transformVars"):
            if options.get(name) or test.get(name):
                self.result.remark(f"`{name}` is JavaScript and has no effect")
        for name in ("rubricPrompt", "disableVarExpansion"):
            if options.get(name):
                self.result.remark(f"the option `{name}` has no effect")
        if test.get("assertScoringFunction"):
            self.result.remark("`assertScoringFunction` has no effect: scores are weighted means")
        variables = self._resolve_variables({**self._vars(self.default), **self._vars(test)}, where)
        if empty := [name for name, value in variables.items() if value == []]:
            raise NotConvertible(f"the list `{empty[0]}` is empty")
        asserts = [*(self.default.get("assert") or []), *(test.get("assert") or [])]
        extra = {name: test[name] for name in ("description", "metadata") if test.get(name)}
        threshold = test.get("threshold", self.default.get("threshold"))
        return _Test(
            where, variables, asserts, parse_number(threshold, 0.0) or None,
            str(options.get("prefix") or ""), str(options.get("suffix") or ""), extra,
            self.judge or parse_judge(options.get("provider")),
        )  # fmt: skip

    def _vars(self, test: Mapping[str, Any]) -> dict[str, Any]:
        variables = test.get("vars") or {}
        if isinstance(variables, str):
            variables = parse_yaml(self._read(variables.removeprefix("file://")), variables)
        if not isinstance(variables, Mapping):
            raise NotConvertible("`vars` must be an object")
        values = {}
        for name, value in variables.items():
            if isinstance(value, str) and value.strip().startswith("file://"):
                path = value.strip().removeprefix("file://")
                if Path(path).suffix not in (".txt", ".md", *YAML_ENDINGS):
                    raise NotConvertible(f"`{name}`: {value} is not a text file")
                text = self._read(path)
                is_yaml = Path(path).suffix in YAML_ENDINGS
                value = json.dumps(parse_yaml(text, path), ensure_ascii=False) if is_yaml else text
            # promptfoo also removes one line end after a text.
            values[str(name)] = value.removesuffix("\n") if isinstance(value, str) else value
        return values

    def _resolve_variables(self, variables: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Resolve references between variables."""
        fill = self._filler(variables, where)
        return {name: fill(value) for name, value in variables.items()}

    def _rows_of_test(
        self, prompt: _Prompt, test: _Test
    ) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
        """Yield the rows of a test: one per combination of values of the list variables."""
        lists = {name: value for name, value in test.vars.items() if isinstance(value, list)}
        for chosen in itertools.product(*lists.values()):
            variables = {**test.vars, **dict(zip(lists, chosen, strict=True))}
            try:
                yield self._row(prompt, test, variables)
            except NotConvertible as error:
                self.result.skip(f"{test.where} with {prompt.label!r}", str(error))

    def _row(
        self, prompt: _Prompt, test: _Test, variables: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        fill = self._filler(variables, test.where)
        if isinstance(prompt.template, str):
            text = f"{test.prefix}{fill(prompt.template)}{test.suffix}"
            content: Any = _messages(text) or text
        else:
            content = fill(prompt.template)
        if isinstance(content, str) and not content.strip():
            raise NotConvertible("the prompt is empty")
        checks = Checks(fill, self._read, test.judge)
        checks.add_all(test.asserts, test.threshold)
        self.embeds |= any(
            each["method"] == "embedding_similarity" for each in checks.graders.values()
        )
        for what, why in checks.skipped:
            self.result.skip(f"{test.where}, {what}", why)
        row: dict[str, Any] = (
            {"prompt": content} if isinstance(content, str) else {"messages": content}
        )
        if checks.expected is not None and isinstance(content, str):
            row["completion"] = checks.expected
        elif checks.expected is not None:
            row["messages"] = [*content, {"role": "assistant", "content": checks.expected}]
        row |= {"vars": dict(variables), "assert": checks.values, **test.beside}
        return {name: value for name, value in row.items() if value not in ({}, [])}, checks.tables

    def _filler(self, variables: Mapping[str, Any], where: str) -> Callable[[Any], Any]:
        """Return a function that fills variables into texts and records missing variables."""

        def missing(name: str) -> None:
            self.without.setdefault(name, {})[where] = None

        return lambda value: map_texts(value, lambda text: _fill(text, variables, missing))

    def _note_the_rest(self) -> None:
        if self.embeds:
            self.result.remark(
                "`similar` uses all-minilm-l6-v2. Check thresholds for another encoder"
            )
        for name, tests in self.without.items():
            first = ", ".join(list(tests)[:3])
            more = f" and {len(tests) - 3:,} more tests" if len(tests) > 3 else ""
            self.result.remark(
                f"{first}{more}: the variable `{name}` is missing and replaced by nothing"
            )
        providers = self.fields.get("providers") or self.fields.get("targets") or []
        names = [
            str(each.get("id", each)) if isinstance(each, Mapping) else str(each)
            for each in (providers if isinstance(providers, list) else [providers])
        ]
        if names:
            self.result.skip(f"providers ({', '.join(names)})", "set the model in each command")
        for name in ("redteam", "derivedMetrics", "extensions", "nunjucksFilters"):
            if self.fields.get(name):
                self.result.skip(name, "no equivalent in luthier")

    def _reasons(self) -> str:
        reasons = [f"{each.where}: {each.reason}" for each in self.result.not_imported[:5]]
        return "; ".join(reasons) or "the file has none"


def _parse_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a test from a table row. Columns with two leading underscores are fields of the test."""
    test: dict[str, Any] = {"vars": {}, "assert": [], "options": {}, "metadata": {}}
    for name, value in record.items():
        if not name.startswith("__"):
            test["vars"][name] = value
        elif re.fullmatch(r"__expected[0-9]*", name) and str(value).strip():
            test["assert"].append(_parse_cell(str(value)))
        elif name in ("__description", "__threshold") and str(value).strip():
            test[name[2:]] = str(value)
        elif name in ("__prefix", "__suffix"):
            test["options"][name[2:]] = str(value)
        elif name.startswith("__metadata:"):
            test["metadata"][name.removeprefix("__metadata:").removesuffix("[]")] = value
    if record.get("__metric"):
        test["assert"] = [{**each, "metric": str(record["__metric"])} for each in test["assert"]]
    return test


def _parse_cell(text: str) -> dict[str, Any]:
    """Return an assertion from a cell: ``contains: Paris``, ``similar(0.8): Hello``, or plain text."""
    match = _EXPECTED.fullmatch(text)
    kinds = (*UNSUPPORTED, *JUDGED, *SIMILARITIES, "equals", "contains", "icontains", "contains-any",
             "contains-all", "icontains-any", "icontains-all", "regex", "starts-with", "is-json",
             "contains-json", "levenshtein", "similar", "python", "is-refusal", "grade", "fn",
             "eval")  # fmt: skip
    if match is None or match[2] not in kinds:
        return {"type": "equals", "value": text}
    if match[4] is None and match[2] not in _WITHOUT_VALUE:
        return {"type": "equals", "value": text}
    kind = {"grade": "llm-rubric", "fn": "javascript", "eval": "javascript"}.get(match[2], match[2])
    fields: dict[str, Any] = {"type": f"{match[1] or ''}{kind}", "value": match[4] or None}
    return fields | ({"threshold": match[3]} if match[3] else {})


def _messages(text: str) -> list[Any] | None:
    """Return the messages if ``text`` is a list of messages in JSON or YAML; otherwise ``None``."""
    if not text.lstrip().startswith(("[", "- ")):
        return None
    try:
        turns_given = parse_yaml(text, "a prompt")
    except RecipeError:
        return None
    if not isinstance(turns_given, list) or not all(
        isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in turns_given
    ):
        return None
    turns = []
    for turn in turns_given:
        role = "system" if turn["role"] == "developer" else turn["role"]
        if role not in _CHAT_ROLES or not isinstance(turn["content"], str):
            raise NotConvertible(
                f"messages need text contents and roles of {', '.join(_CHAT_ROLES)}"
            )
        turns.append({"role": role, "content": turn["content"]})
    return turns or None


@cache
def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True, finalize=_as_javascript)
    environment.filters["dump"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.filters["load"] = json.loads
    return environment


def _as_javascript(value: Any) -> Any:
    """Return a value as a Nunjucks template writes the value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


@cache
def _template(text: str) -> tuple[Any, frozenset[str]]:
    from jinja2.meta import find_undeclared_variables

    environment = _environment()
    return (
        environment.from_string(text),
        frozenset(find_undeclared_variables(environment.parse(text))),
    )


def _fill(text: str, variables: Mapping[str, Any], missing: Callable[[str], None]) -> str:
    """Return ``text`` with variables filled in."""
    from jinja2 import TemplateError

    if "{{" not in text and "{%" not in text:
        return text
    try:
        template, names = _template(text)
        for name in sorted(names - variables.keys()):
            missing(name)
        return str(template.render(variables))
    except (
        TemplateError,
        ValueError,
        TypeError,
        ArithmeticError,
        MemoryError,
        RecursionError,
    ) as error:
        raise NotConvertible(f"the template cannot be rendered: {error}") from error
