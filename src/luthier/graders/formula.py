"""Several graders, and a formula of their scores, as OpenAI's ``multi`` has it."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from luthier.graders.base import Answer, Trouble, Ungraded
from luthier.graders.mix import CompositeGrader
from luthier.graders.specs import AnyGrader

LONGEST = 1000
DEEPEST = 200
"""Operations within operations; a formula is read and computed by functions that call themselves."""
_OPERATORS: Mapping[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil,
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip

_ARGUMENTS = {"min": (2, math.inf), "max": (2, math.inf), "log": (1, 2)}
"""How many a function takes, where that is not one."""


class Multi(CompositeGrader):
    """What ``calculate_output`` gives of the scores of ``graders``, by their names.

    The formula knows ``+ - * / ^``, brackets, numbers, the names, and min, max, abs, floor, ceil, exp,
    sqrt, log; and, which OpenAI's does not, comparisons by ``< <= > >=``, which are 1 or 0. It is read
    as a tree of these and nothing else; no Python is executed.
    """

    method: Literal["multi"] = "multi"
    graders: dict[str, AnyGrader] = Field(min_length=1, max_length=16)
    """The graders by names of your own."""
    calculate_output: str = Field(min_length=1, max_length=LONGEST)
    """The formula."""

    parts_field = "graders"

    @model_validator(mode="after")
    def _check_formula(self) -> Self:
        tree = parse_formula(self.calculate_output)
        unknown = names_in(tree) - self.graders.keys()
        if unknown:
            raise ValueError(
                f"the formula names {sorted(unknown)}; there are {', '.join(self.graders)}"
            )
        _check_constants(tree)
        return self

    @property
    def is_share(self) -> bool:
        """Whether it is a comparison: any other formula may give any number."""
        return isinstance(parse_formula(self.calculate_output), ast.Compare)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """The formula for each answer; :class:`Ungraded` where a grader or the formula gives none."""
        troubles: dict[int, Trouble] = {}
        return self.combine(self.each(answers, troubles), len(answers), troubles)

    def combine(
        self, scores: Mapping[str, Sequence[float]], count: int, troubles: dict[int, Trouble]
    ) -> list[float]:
        """The formula of ``scores``."""
        tree, totals = parse_formula(self.calculate_output), []
        for index in range(count):
            total = math.nan
            if index not in troubles:
                try:
                    total = value_of(tree, {name: each[index] for name, each in scores.items()})
                except (ArithmeticError, ValueError) as error:
                    text = f"the formula {self.calculate_output!r} has no value: {error}."
                    fix = "Mend the formula."
                    troubles[index] = Trouble("grader.formula", text, fix)
            totals.append(total)
        if troubles:
            raise Ungraded(totals, troubles)
        return totals


def parse_formula(formula: str) -> ast.expr:
    """The formula as a tree; :class:`ValueError` for what is none."""
    try:
        tree = ast.parse(formula.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{formula!r} is no formula") from error
    names_in(tree)
    return tree


def names_in(tree: ast.AST, depth: int = 0) -> set[str]:
    """Names of scores; :class:`ValueError` for anything a formula does not have."""
    if depth > DEEPEST:
        raise ValueError(f"a formula may be nested {DEEPEST} deep")
    if isinstance(tree, ast.Name):
        return {tree.id}
    if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
        return set()
    parts: list[ast.AST] = []
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        parts = [tree.left, tree.right]
    elif isinstance(tree, ast.UnaryOp) and type(tree.op) in _OPERATORS:
        parts = [tree.operand]
    elif isinstance(tree, ast.Compare) and [type(op) in _OPERATORS for op in tree.ops] == [True]:
        parts = [tree.left, *tree.comparators]
    elif isinstance(tree, ast.Call) and _function_name(tree) in _FUNCTIONS and not tree.keywords:
        parts = list(tree.args)
    if not parts:
        raise ValueError(
            "a formula has numbers, names, + - * / ^, brackets, a comparison and few functions"
        )
    return set[str]().union(*(names_in(part, depth + 1) for part in parts))


def value_of(tree: ast.AST, scores: Mapping[str, float]) -> float:
    """The value of a formula."""
    if isinstance(tree, ast.Name):
        return scores[tree.id]
    if isinstance(tree, ast.Constant):
        return float(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](value_of(tree.left, scores), value_of(tree.right, scores))
    if isinstance(tree, ast.UnaryOp):
        return _OPERATORS[type(tree.op)](value_of(tree.operand, scores))
    if isinstance(tree, ast.Compare):
        both = value_of(tree.left, scores), value_of(tree.comparators[0], scores)
        return float(_OPERATORS[type(tree.ops[0])](*both))
    assert isinstance(tree, ast.Call)
    arguments: list[Any] = [value_of(each, scores) for each in tree.args]
    try:
        return float(_FUNCTIONS[_function_name(tree)](*arguments))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_constants(tree: ast.AST) -> None:
    """Refuse a part without names that has no value, whatever the scores are."""
    if isinstance(tree, ast.Call):
        fewest, most = _ARGUMENTS.get(name := _function_name(tree), (1, 1))
        if not fewest <= len(tree.args) <= most:
            raise ValueError(f"{name} takes another number of arguments than {len(tree.args)}")
    if not names_in(tree):
        try:
            value = value_of(tree, {})
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"{ast.unparse(tree)} has no value: {error}") from error
        if not math.isfinite(value):
            raise ValueError(f"{ast.unparse(tree)} is no finite number")
        return
    for part in ast.iter_child_nodes(tree):
        if isinstance(part, ast.expr):
            _check_constants(part)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Div):
        divisor = math.nan if names_in(tree.right) else value_of(tree.right, {})
        if divisor == 0:
            raise ValueError("the formula divides by 0")


def _function_name(tree: ast.Call) -> str:
    return tree.func.id if isinstance(tree.func, ast.Name) else ""
