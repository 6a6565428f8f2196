"""Graders: scores of replies, for evaluation and as rewards in training."""

from __future__ import annotations

from luthier.chat_models.base import Writer
from luthier.graders.base import Answer, Grader, GraderModels, Scorer, Ungraded
from luthier.graders.classifier import Classifier
from luthier.graders.code import Code
from luthier.graders.embedding_similarity import EmbeddingSimilarity
from luthier.graders.exact import Exact, FirstLine
from luthier.graders.formula import Multi
from luthier.graders.grade import Grades, OnError, check_rows, grade_answers
from luthier.graders.json_schema import JsonSchema
from luthier.graders.judge import Judge
from luthier.graders.lambda_function import LambdaFunction
from luthier.graders.mix import Mix
from luthier.graders.number import Number
from luthier.graders.python_source import PythonSource
from luthier.graders.regex import Regex
from luthier.graders.reward import Reward
from luthier.graders.ruler import Ruler
from luthier.graders.score_model import LabelModel, ScoreModel
from luthier.graders.similarity import Similarity, TextSimilarity
from luthier.graders.specs import AnyGrader, Spec, grader_from, parse_graders, read_graders
from luthier.graders.string_check import StringCheck
from luthier.graders.tool_calls import ToolCalls
from luthier.plugins import PluginTable

GRADERS: PluginTable[type[Grader]] = PluginTable(
    "graders",
    Grader,
    {
        "exact": Exact,
        "first_line": FirstLine,
        "number": Number,
        "regex": Regex,
        "similarity": Similarity,
        "embedding_similarity": EmbeddingSimilarity,
        "classifier": Classifier,
        "json_schema": JsonSchema,
        "tool_calls": ToolCalls,
        "code": Code,
        "judge": Judge,
        "ruler": Ruler,
        "reward": Reward,
        "mix": Mix,
        "string_check": StringCheck,
        "text_similarity": TextSimilarity,
        "python": PythonSource,
        "lambda": LambdaFunction,
        "score_model": ScoreModel,
        "label_model": LabelModel,
        "multi": Multi,
    },
)

__all__ = [
    "GRADERS",
    "Answer",
    "AnyGrader",
    "Classifier",
    "Code",
    "EmbeddingSimilarity",
    "Exact",
    "FirstLine",
    "Grader",
    "GraderModels",
    "Grades",
    "JsonSchema",
    "Judge",
    "LabelModel",
    "LambdaFunction",
    "Mix",
    "Multi",
    "Number",
    "OnError",
    "PythonSource",
    "Regex",
    "Reward",
    "Ruler",
    "ScoreModel",
    "Scorer",
    "Similarity",
    "Spec",
    "StringCheck",
    "TextSimilarity",
    "ToolCalls",
    "Ungraded",
    "Writer",
    "check_rows",
    "grade_answers",
    "grader_from",
    "parse_graders",
    "read_graders",
]
