"""``luthier advise``: a recommended technique, computed and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.terminal.console import check_output, heavy_imports, print_tables, print_text
from luthier.cli.terminal.options import TUNING, RowSource, TuningFields, field_path, tuning_recipe

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.advise.recommend import Advice


def advise(
    data: RowSource,
    *,
    documents: Sequence[str | Path] = (),
    goal: Literal["quality", "cost", "latency", "knowledge", "style"] = "quality",
    max_minutes: float | None = None,
    max_seconds: float | None = None,
    max_megabytes: float | None = None,
    trial: Annotated[float, typer.Option(min=0)] = 60.0,
    recipe: Path | None = None,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> Advice:
    """Recommend a technique, measured on your rows.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        documents: Text, document or folder with the facts for replies; repeatable.
        goal: Main goal; knowledge is facts in documents.
        max_minutes: Time limit of training.
        max_seconds: Time limit of a reply.
        max_megabytes: Size limit of the model.
        trial: Seconds of trial training; 0 for none.
        recipe: Write the recommended recipe (TOML) to this file.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        ``judgements`` of each technique, the ``recommendation`` with reasons and commands, and the
        ``facts`` behind them.

    Raises:
        RefusedInput: for an invalid recipe or invalid documents.
    """
    chosen = tuning_recipe(data, fields)
    check_output(recipe)
    with heavy_imports():
        from luthier.documents.readers import load_texts
        from luthier.engine.metrics import Reporter
        from luthier.recipe import portable, to_toml
        from luthier.workflows.advise import command_of
        from luthier.workflows.advise.facts import Wishes, collect
        from luthier.workflows.advise.recommend import recommend

    dotted = {field_path(name, value, TUNING): value for name, value in fields.items()}
    wishes = Wishes(goal, max_minutes, max_seconds, max_megabytes)
    texts = load_texts([str(source) for source in documents])
    facts = collect(chosen, texts, wishes, trial, reporter or Reporter())
    found = recommend(facts, command_of(str(data), dotted))
    if recipe is not None:
        from luthier.files import write_bytes

        reasons = "".join(f"# {reason}\n" for reason in found.recommendation.reasons)
        write_bytes(recipe, (reasons + to_toml(portable(chosen))).encode())
    return found


def show_advice(advice: Advice) -> None:
    """Print the techniques as tables, and the recommendation below."""
    from luthier.workflows.advise.recommend import forgetting, overfitting

    print_tables(advice.tables())
    facts, chosen = advice.facts, advice.recommendation
    print_text(
        f"Training: {facts.cost}. Risk of overfitting: {overfitting(facts)}; of forgetting: "
        f"{forgetting(facts)}"
    )
    what = ", then ".join(chosen.techniques) or "fix the data first"
    what += "" if chosen.sure else ", as a first trial"
    print_text(what + ("" if chosen.tune else "  (do not tune)"))
    lines = {"reason": chosen.reasons, "note": chosen.cautions, "next": chosen.commands}
    for label, texts in lines.items():
        for text in texts:
            print_text(f"  {label:7} {text}")
