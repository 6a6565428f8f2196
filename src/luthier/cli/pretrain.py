"""``luthier pretrain``: a base model from raw text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import heavy_imports, new_console
from luthier.cli.terminal.options import (
    TUNING,
    AtLeastOne,
    RecipeField,
    assign_fields,
    recipe_keywords,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result

PRETRAINING: Mapping[str, RecipeField] = {
    "name": RecipeField("name", "Name of the new model."),
    "size": RecipeField("network.size", "Size: tiny, 3m, 10m, 30m or 135m weights."),
    "base": RecipeField("network.base", "Base model for continued pre-training."),
    "adaptation": TUNING["adaptation"],
    "family": RecipeField("network.family", "llama, gpt2, bert, t5, palm, transfo_xl or lstm."),
    "config": RecipeField("network.config", "A config.json, instead of size and family.", Path),
    "vocabulary": RecipeField("tokenizer.vocabulary", "Number of tokens of the tokenizer.", int),
    "context": RecipeField("network.context", "Context length in tokens.", int),
    "validation": RecipeField("data.validation", "Text for validation; repeatable.", list[str]),
    "epochs": TUNING["epochs"],
    "batch_size": RecipeField("training.batch_size", "Sequences per step.", int),
    "learning_rate": TUNING["learning_rate"],
    "seed": TUNING["seed"],
}
"""Recipe fields of pre-training by short name."""


def pretrain(
    data: Annotated[str | Path | Sequence[str | Path], FromText(list[str])],
    *,
    resume: bool = False,
    processes: AtLeastOne = 1,
    reporter: Reporter | None = None,
    **fields: Annotated[Any, recipe_keywords(PRETRAINING)],
) -> Result:
    """Train a base model on raw text.

    Training starts from random weights with a new tokenizer, or continues from --base. All weights of
    the base are trained unless --adaptation names an adapter. The text may exceed the memory.

    Args:
        data: Files of raw text (.txt, .md, JSONL), or a recipe (.toml).
        resume: Resume an interrupted run.
        processes: Processes of this machine that share each step.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, such as ``name="..."``, which is required, or
            ``training__beta2=0.99``, with ``__`` for the dot.

    Returns:
        Model id, folders, losses, time and memory of the run.

    Raises:
        RefusedInput: before training, for invalid text or settings.
    """
    from luthier.recipe import fields_of
    from luthier.workflows.pretrain_recipe import PretrainRecipe

    plain = fields_of([data] if isinstance(data, str | Path) else data)
    given = assign_fields(plain, fields, PRETRAINING)
    if "name" not in given:
        raise RecipeError("`name` is missing: --name my-base", setting="name")
    recipe = PretrainRecipe.parse(given)
    # Importing torch takes seconds: only after the check of the recipe.
    with heavy_imports():
        from luthier.workflows.pretrain import pretrain as run

    return run(recipe, resume, reporter, processes)


def show_pretraining(result: Result) -> None:
    """Print the result of a pre-training and the next commands."""
    from luthier.cli.tune import loss_figures, print_verdict
    from luthier.evaluation.significance import perplexity_of
    from luthier.library.models import find

    out = new_console(highlight=False, soft_wrap=True)
    held = ""
    if (loss := result.validation_loss) is not None:
        held = f"loss {loss:.4f} (perplexity {perplexity_of(loss):.1f})"
    kind = "an adapter" if ":" in result.model_id else "a base model"
    out.print(f"\n[bold green]{result.model_id}[/bold green] is {kind}, stored and verified")
    speed = result.tokens / max(result.seconds, 1e-9)
    out.print(
        f"  {result.steps:,} steps, {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({speed:,.0f} per second); {loss_figures(result, held)}; "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    )
    print_verdict(result)
    out.print(f"  loss curve  {result.run_dir}/loss.png")
    if find(result.model_id).writes:
        out.print(f'  use it      luthier generate {result.model_id} "Once"')
    out.print(f"  tune it     luthier tune DATA --base {result.model_id}")
