"""Conversion of promptfoo's assertions to graders.

The expected values of assertions are stored in the row, under ``assert``, so tests with equal kinds
of assertions share graders. Source: promptfoo's pages on expected outputs, 2026.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import RecipeError
from luthier.graders import parse_graders
from luthier.migrate.files import YAML_ENDINGS, NotConvertible, parse_number, parse_yaml

MOST_PARTS = 16
"""Maximum number of graders in a formula."""

UNSUPPORTED = {
    "javascript": "JavaScript is not supported; write a `python` grader",
    "ruby": "Ruby is not supported; write a `python` grader",
    "webhook": "graders call no webhooks; write a `python` grader",
    "latency": "`luthier compare` measures latency",
    "cost": "`luthier compare --prices` reports costs",
    "perplexity": "`luthier evaluate` measures perplexity on rows of raw text",
    "perplexity-score": "`luthier evaluate` measures perplexity on rows of raw text",
    "answer-relevance": "no grader generates questions; use `llm-rubric`",
    "classifier": "tune a classifier and evaluate the classifier",
    "moderation": "needs OpenAI's moderation service",
    "select-best": "`luthier compare --judge` compares models",
    "meteor": "no grader computes METEOR; use `rouge-n`, `bleu` or `gleu`",
    "max-score": "`luthier compare` compares models",
    "human": "see `luthier evaluate --judge --human`",
}
_AGREEMENT = (
    "The reply agrees with the reference in all facts it states, and leaves out none that is "
    "essential."
)
JUDGED = {
    "llm-rubric": "The reply fulfils the rubric.",
    "model-graded-closedqa": "The reply meets the criterion.",
    "factuality": _AGREEMENT,
    "model-graded-factuality": _AGREEMENT,
    "g-eval": "The reply fulfils the criterion.",
}
SIMILARITIES = {
    "rouge-n": ("rouge_1", 0.75),
    "bleu": ("bleu", 0.5),
    "gleu": ("gleu", 0.5),
}
_CONTAINS_JSON = """
import json

def grade(sample, item):
    text, decoder = sample["output_text"], json.JSONDecoder()
    for place, letter in enumerate(text):
        if letter in "{[":
            try:
                decoder.raw_decode(text, place)
            except ValueError:
                continue
            return 1.0
    return 0.0
"""
_LEVENSHTEIN = """
def grade(sample, item):
    given, wanted = sample["output_text"], str(item["assert"][PLACE])
    row = list(range(len(wanted) + 1))
    for i, one in enumerate(given, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]
"""
_PYTHON = """

def grade(sample, item):
    context = {
        "vars": item.get("vars", {}), "prompt": item.get("prompt", ""), "config": CONFIG,
        "test": {"vars": item.get("vars", {})},
    }
    result = FUNCTION(sample["output_text"], context)
    if isinstance(result, dict):
        result = result.get("pass", result.get("pass_", result.get("score", 0)))
    return float(result)
"""


@dataclass
class Checks:
    """The assertions of one test as graders. :attr:`values` has the expected values of the test."""

    fill: Callable[[Any], Any]
    read: Callable[[str], str]
    judge: str | None
    values: list[Any] = field(default_factory=list)
    graders: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The written graders: one per assertion, and ``pass`` for the whole test."""
    passed: list[tuple[str, str, float]] = field(default_factory=list)
    """Formula of the score, formula of the pass condition, and weight of each assertion."""
    expected: str | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Assertions without an equivalent, with reasons."""

    def add_all(self, asserts: Sequence[Any], threshold: float | None) -> None:
        """Convert the assertions of a test. The test passes if all pass, or by its ``threshold``."""
        for assertion in asserts:
            kind = assertion.get("type") if isinstance(assertion, Mapping) else None
            before = len(self.values), set(self.graders)
            try:
                if not isinstance(kind, str) or not isinstance(assertion, Mapping):
                    raise NotConvertible("an assertion must be an object with a `type`")
                weight = parse_number(assertion.get("weight"), 1.0)
                score, passed, graders = self._formulas(assertion)
                parse_graders(graders)
            except (NotConvertible, RecipeError) as error:
                del self.values[before[0] :]
                self.graders = {n: g for n, g in self.graders.items() if n in before[1]}
                self.skipped.append((f"assertion `{kind}`", " ".join(str(error).split())))
                continue
            name = self._name(str(assertion.get("metric") or kind), self.tables)
            first = next(iter(graders))
            simple = len(graders) == 1 and passed == first
            self.tables[name] = graders[first] if simple else _formula(graders, passed)
            self.passed.append((score, passed, weight))
        if self.passed and self.skipped:
            self.skipped.append(("result of the test", "some assertions are not imported"))
        elif len(self.passed) > 1 or (threshold and self.passed):
            self._add_whole(threshold)

    def _add_whole(self, threshold: float | None) -> None:
        weighted = [each for each in self.passed if each[2] > 0]
        if not weighted:
            return
        _, formula = _combine(weighted, threshold)
        if len(self.graders) > MOST_PARTS or len(formula) > 1000:
            self.skipped.append(("the test's result", f"more than {MOST_PARTS} parts"))
            return
        self.tables["pass"] = _formula(self.graders, formula)

    def _formulas(self, assertion: Mapping[str, Any]) -> tuple[str, str, dict[str, dict[str, Any]]]:
        """Return score formula, pass formula and graders of an assertion."""
        kind = str(assertion["type"])
        if kind == "assert-set":
            before = set(self.graders)
            inner = Checks(self.fill, self.read, self.judge, self.values, self.graders)
            inner.add_all(assertion.get("assert") or [], None)
            if inner.skipped:
                raise NotConvertible("; ".join(f"{what}: {why}" for what, why in inner.skipped))
            threshold = parse_number(assertion.get("threshold"), 0.0)
            if not inner.passed:
                raise NotConvertible("the set has no assertions")
            score, passed = _combine(inner.passed, threshold)
            added = {name: each for name, each in self.graders.items() if name not in before}
            return score, passed, added
        if assertion.get("transform") or assertion.get("contextTransform"):
            raise NotConvertible("transforms are JavaScript, which is not supported")
        negated = kind.startswith("not-")
        kind = kind.removeprefix("not-")
        before = set(self.graders)
        value = self._value(assertion.get("value"))
        score, passed = self._positive(kind, value, assertion)
        added = {name: grader for name, grader in self.graders.items() if name not in before}
        if kind == "equals" and not negated and isinstance(value, str):
            self.expected = value
        return (f"1 - ({score})", f"({passed}) < 1", added) if negated else (score, passed, added)

    def _value(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("file://"):
            name = value.removeprefix("file://")
            path, _, function = name.partition(".py:")
            text = self.read(f"{path}.py" if function else name)
            if ".py" in name:
                return _Source(text, function or "get_assert")
            return parse_yaml(text, name) if name.endswith(YAML_ENDINGS) else text.strip()
        return self.fill(value)

    def _positive(self, kind: str, value: Any, assertion: Mapping[str, Any]) -> tuple[str, str]:
        judge = self.judge or parse_judge(assertion.get("provider"))
        if isinstance(value, _Source) and kind != "python":
            raise NotConvertible("generated values are not supported")
        if kind in UNSUPPORTED or (kind in JUDGED and judge is None):
            raise NotConvertible(
                UNSUPPORTED.get(kind) or "no judge is set. Import again with --judge"
            )
        threshold = assertion.get("threshold")
        if kind in JUDGED:
            return self._model_judge(kind, value, threshold, str(judge))
        if kind in ("equals", "contains", "icontains"):
            return self._comparison(kind, value)
        if kind in ("contains-any", "contains-all", "icontains-any", "icontains-all"):
            parts = value if isinstance(value, list) else str(value).split(",")
            if not 0 < len(parts) <= MOST_PARTS:
                raise NotConvertible(
                    f"{len(parts)} texts are too many or too few: use 1 to {MOST_PARTS}"
                )
            base, _, quantifier = kind.rpartition("-")
            scores = [self._comparison(base, str(word).strip())[0] for word in parts]
            function, neutral = ("max", 0) if quantifier == "any" else ("min", 1)
            formula = f"{function}({', '.join(scores)}, {neutral})"
            return formula, f"{formula} >= 1"
        if kind in ("regex", "starts-with"):
            pattern = (
                rf"\A{re.escape(str(value))}" if kind == "starts-with" else _convert_regex(value)
            )
            return self._one(kind, {"method": "regex", "pattern": pattern})
        if kind == "is-json":
            schema = parse_yaml(value, "the schema") if isinstance(value, str) else value
            if not isinstance(schema or {}, Mapping):
                raise NotConvertible("the schema must be an object")
            return self._one(kind, _schema(schema or {}))
        if kind == "contains-json":
            if value:
                raise NotConvertible("schemas apply to whole replies only. Use `is-json`")
            return self._one(kind, {"method": "python", "source": _CONTAINS_JSON})
        if kind in SIMILARITIES:
            metric, default = SIMILARITIES[kind]
            name, _ = self._one(
                kind, {"method": "text_similarity", "evaluation_metric": metric,
                       "reference": self._place(str(value))}
            )  # fmt: skip
            return name, f"{name} >= {parse_number(threshold, default):g}"
        if kind == "similar":
            fields = {"method": "embedding_similarity", "reference": self._place(str(value))}
            name, _ = self._one(kind, fields)
            return name, f"{name} >= {parse_number(threshold, 0.75):g}"
        if kind == "levenshtein":
            self.values.append(str(value))
            source = _LEVENSHTEIN.replace("PLACE", str(len(self.values) - 1))
            name, _ = self._one(kind, {"method": "python", "source": source})
            passed = f"{name} <= {parse_number(threshold, 5):g}"
            return passed, passed
        if kind == "python":
            return self._python(value, threshold, assertion.get("config"))
        raise NotConvertible("no equivalent grader")

    def _comparison(self, kind: str, value: Any) -> tuple[str, str]:
        """Return the formulas of an equality or containment check."""
        if isinstance(value, (Mapping, list)):
            if kind != "equals":
                raise NotConvertible("the value must be text")
            return self._one(kind, _schema({"const": value}))
        if value is None:
            raise NotConvertible("`value` is missing")
        operation = {"equals": "eq", "contains": "like", "icontains": "ilike"}[kind]
        text = value if isinstance(value, str) else json.dumps(value)
        fields = {"method": "string_check", "operation": operation, "reference": self._place(text)}
        return self._one(kind, fields)

    def _model_judge(self, kind: str, value: Any, threshold: Any, judge: str) -> tuple[str, str]:
        if not isinstance(value, str):
            raise NotConvertible("the rubric must be text")
        claim = JUDGED[kind]
        question = (
            f"A reply is to be judged. Claim: {claim}\n\nPrompt:\n{{{{item.messages}}}}\n\n"
            "Reply:\n{{sample.output_text}}\n\n"
            f"Rubric, criterion or reference:\n{self._place(value)}"
        )
        fields: dict[str, Any] = {
            "model": judge,
            "input": [{"role": "user", "content": question}],
        }
        if threshold is None and kind != "g-eval":
            labels = {"labels": ["holds", "does not hold"], "passing_labels": ["holds"]}
            return self._one(kind, {"method": "label_model", **fields, **labels})
        fields["input"][0]["content"] += "\n\nHow far does the claim hold, from 0 to 1?"
        name, _ = self._one(kind, {"method": "score_model", **fields})
        return name, f"{name} >= {parse_number(threshold, 0.7):g}"

    def _python(self, value: Any, threshold: Any, config: Any) -> tuple[str, str]:
        source = value if isinstance(value, _Source) else None
        if source is None:
            body = str(value).strip("\n")
            is_expression = "\n" not in body and not body.startswith("return ")
            lines = [f"return {body.strip()}"] if is_expression else body.splitlines()
            code = "\n".join(
                ["def get_assert(output, context):", *(f"    {each}" for each in lines)]
            )
            source = _Source(code, "get_assert")
        call = _PYTHON.replace("FUNCTION", source.function).replace("CONFIG", repr(config or {}))
        code = source.text.rstrip() + "\n" + call
        name, _ = self._one("python", {"method": "python", "source": code})
        return (
            name,
            f"{name} > 0" if threshold is None else f"{name} >= {parse_number(threshold, 0.0):g}",
        )

    def _one(self, kind: str, fields: dict[str, Any]) -> tuple[str, str]:
        name = self._name(kind, self.graders)
        self.graders[name] = fields
        return name, name

    def _place(self, text: str) -> str:
        """Store ``text`` in the row and return the template that refers to ``text``."""
        self.values.append(text)
        return f"{{{{item.assert[{len(self.values) - 1}]}}}}"

    @staticmethod
    def _name(kind: str, used: Mapping[str, Any]) -> str:
        stem = re.sub(r"\W+", "_", kind.lower(), flags=re.ASCII).strip("_") or "check"
        stem = f"check_{stem}" if stem[0].isdigit() or stem == "pass" else stem
        numbers = (stem if n == 1 else f"{stem}_{n}" for n in itertools.count(1))
        return next(name for name in numbers if name not in used)


@dataclass(frozen=True)
class _Source:
    """The source of a Python file and the name of the grading function."""

    text: str
    function: str


def _combine(parts: Sequence[tuple[str, str, float]], threshold: float | None) -> tuple[str, str]:
    """Return the formulas of the weighted mean and of the joint pass condition of assertions."""
    total = " + ".join(f"{weight:g} * ({score})" for score, _, weight in parts)
    score = f"({total}) / {sum(weight for *_, weight in parts) or 1:g}"
    if threshold:
        return score, f"{score} >= {threshold:g}"
    return score, f"min({', '.join(passed for _, passed, _ in parts)}, 1) >= 1"


def _formula(graders: Mapping[str, dict[str, Any]], formula: str) -> dict[str, Any]:
    return {"method": "multi", "calculate_output": formula, "graders": dict(graders)}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    if "null" in re.findall(r'"(?:[^"\\]|\\.)*"|null', json.dumps(schema, default=str)):
        raise NotConvertible("null is not supported in grader files")
    return {"method": "json_schema", "against": dict(schema)}


def _convert_regex(pattern: Any) -> str:
    """Return a Python pattern with JavaScript's meaning of digits (ASCII) and of ``$`` (end of
    text)."""
    text = str(pattern)
    if re.search(r"(?<!\\)(?:\\\\)*\$\Z", text):
        text = text[:-1] + r"\Z"
    return f"(?a){text}"


def parse_judge(provider: Any) -> str | None:
    """Return the OpenAI model that a test or assertion names as the judge of rubrics."""
    if isinstance(provider, Mapping):
        provider = provider.get("text") or provider.get("id")
        provider = provider.get("id") if isinstance(provider, Mapping) else provider
    match = re.fullmatch(r"openai:(?:chat:|responses:)?([\w.-]+)", str(provider))
    return f"https://api.openai.com/v1#{match[1]}" if match else None
