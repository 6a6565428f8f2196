"""Arguments and options that several commands take. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_OBJECTIVES = (
    "sft, causal_lm, masked_lm, span_corruption, bilm, classification, semi_supervised, regression, "
    "token_classification, contrastive, dpo, kto, orpo, reward_model, grpo or ppo; chosen by the rows "
    "when not given. With a teacher (--set objective.teacher=ID): logit_distillation, "
    "on_policy_distillation, encoder_distillation or embedding_distillation."
)
_ADAPTATIONS = (
    "lora, qlora, full, freeze, feature_extraction, bitfit, sparse, adapters, prompt or prefix."
)
Data = Annotated[
    str,
    typer.Argument(
        help="File, folder, 'pattern*' or s3:// with rows or text, or a recipe (.toml)."
    ),
]
Validation = Annotated[str | None, typer.Option(help="Rows to measure on.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="KEY=COLUMN",
        help="What the data calls a key: prompt=question; text= sets a column aside. May be repeated.",
    ),
]
LongRows = Annotated[
    Literal["error", "drop", "truncate"] | None,
    typer.Option(
        help="What becomes of rows longer than the context: refuse all, leave them out, cut them."
    ),
]
Mix = Annotated[
    list[str] | None,
    typer.Option(help="Further rows: FILE=RATIO, so many for each row of the main file."),
]
Base = Annotated[str | None, typer.Option(help="Model to start from.")]
Objective = Annotated[str | None, typer.Option(help=_OBJECTIVES)]
Adaptation = Annotated[str | None, typer.Option(help=_ADAPTATIONS)]
Prices = Annotated[
    Path | None, typer.Option(help="Price table (TOML); prices.toml of LUTHIER_HOME if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
ServiceDatabase = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        # As the server has it: in a container with PostgreSQL a command would make another one.
        envvar="LUTHIER_DATABASE",
        show_envvar=False,
        help="The service's database; LUTHIER_DATABASE, or the one in LUTHIER_HOME, if not given.",
    ),
]
