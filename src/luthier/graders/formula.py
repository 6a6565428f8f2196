"""A formula of the scores of several graders, as OpenAI's ``multi`` grader."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from luthier.errors import RowRefused
from luthier.graders.base import Answer, Ungraded
from luthier.graders.mix import CompositeGrader
from luthier.graders.specs import AnyGrader

LONGEST = 1000
DEEPEST = 200
"""Nested operations: a formula is checked and compiled by recursive functions."""
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd,
    ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_FUNCTIONS: Mapping[str, Any] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil,
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip


class Multi(CompositeGrader):
    """The value of ``calculate_output``, a formula of the scores of ``graders`` by name.

    The formula has ``+ - * / ^``, brackets, numbers, names, and min, max, abs, floor, ceil, exp,
    sqrt and log. Unlike OpenAI's, it may compare with ``< <= > >=``, which gives 1 or 0.
    """

    method: Literal["multi"] = "multi"
    graders: dict[str, AnyGrader] = Field(min_length=1, max_length=16)
    """Graders by names of your choice."""
    calculate_output: str = Field(min_length=1, max_length=LONGEST)
    """The formula."""

    parts_field = "graders"

    @model_validator(mode="after")
    def _check_formula(self) -> Self:
        tree = parse_formula(self.calculate_output)
        if unknown := names_in(tree) - self.graders.keys():
            raise ValueError(
                f"the formula names {sorted(unknown)}; the graders are {', '.join(self.graders)}"
            )
        check_constants(tree)
        return self

    @property
    def is_share(self) -> bool:
        """True if the formula is a comparison. Any other formula may have any value."""
        return isinstance(parse_formula(self.calculate_output), ast.Compare)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the value for each answer; raise :class:`Ungraded` if a part or value is
        missing."""
        faults: dict[int, RowRefused] = {}
        return self.combine(self.grade_parts(answers, faults), len(answers), faults)

    def combine(
        self, scores: Mapping[str, Sequence[float]], count: int, faults: dict[int, RowRefused]
    ) -> list[float]:
        """Return the values of the formula for the scores of ``count`` answers."""
        code, totals = compile_formula(self.calculate_output), [math.nan] * count
        for index in range(count):
            if index in faults:
                continue
            try:
                own = {name: each[index] for name, each in scores.items()}
                totals[index] = value_of(code, own)
            except (ArithmeticError, ValueError) as error:
                text = f"the formula {self.calculate_output!r} has no value: {error}."
                faults[index] = RowRefused("grader.formula", text, "Fix the formula.")
        if faults:
            raise Ungraded(totals, faults)
        return totals


def parse_formula(formula: str) -> ast.expr:
    """Parse and check a formula; raise :class:`ValueError` for anything else."""
    try:
        tree = ast.parse(formula.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{formula!r} is not a formula") from error
    names_in(tree)
    return tree


def names_in(tree: ast.AST, depth: int = 0) -> set[str]:
    """Return the names of scores; raise :class:`ValueError` for anything else than a formula."""
    if depth > DEEPEST:
        raise ValueError(f"a formula has at most {DEEPEST} nested operations")
    if isinstance(tree, ast.Name):
        return {tree.id}
    if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
        return set()
    parts: list[ast.expr] = []
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, _OPERATORS):
        parts = [tree.left, tree.right]
    elif isinstance(tree, ast.UnaryOp) and isinstance(tree.op, _OPERATORS):
        parts = [tree.operand]
    elif isinstance(tree, ast.Compare) and len(tree.ops) == 1:
        parts = [tree.left, *tree.comparators] if isinstance(tree.ops[0], _OPERATORS) else []
    elif isinstance(tree, ast.Call) and not tree.keywords:
        is_known = isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS
        parts = list(tree.args) if is_known else []
    if not parts:
        raise ValueError(
            "a formula has numbers, names, + - * / ^, brackets, a comparison, and the functions "
            f"{', '.join(_FUNCTIONS)}"
        )
    return set[str]().union(*(names_in(part, depth + 1) for part in parts))


def check_constants(tree: ast.expr) -> None:
    """Reject an expression without a value, such as ``a / (1 - 1)``.

    Raises:
        ValueError: the expression has no value.
    """
    for part in ast.walk(tree):
        trials = [part]
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div):
            trials.append(ast.BinOp(ast.Constant(1), ast.Div(), part.right))
        if isinstance(part, ast.Call):  # a wrong number of arguments
            trials.append(ast.Call(part.func, [ast.Constant(0.5)] * len(part.args), []))
        for trial in trials:
            if isinstance(trial, ast.expr) and not names_in(trial):
                try:
                    value_of(compile_formula(ast.unparse(trial)), {})
                except (ArithmeticError, ValueError) as error:
                    raise ValueError(f"{ast.unparse(part)} has no value: {error}") from error


def compile_formula(formula: str) -> CodeType:
    """Return the code of a formula; raise :class:`ValueError` for anything else."""
    tree = parse_formula(formula)
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant):
            assert isinstance(part.value, int | float)
            part.value = float(part.value)  # a power of ints may not end
    return compile(ast.Expression(tree), "formula", "eval")


def value_of(code: CodeType, scores: Mapping[str, float]) -> float:
    """Return the value of a formula.

    Raises:
        ArithmeticError, ValueError: if the formula has no value.
    """
    try:
        # The tree has only the parts that `names_in` allows, and no attribute or builtin.
        value = eval(code, {"__builtins__": {}, **_FUNCTIONS, **scores})  # noqa: S307
        return float(value)
    except TypeError as error:  # a complex power, or a wrong number of arguments
        raise ValueError(str(error)) from error
