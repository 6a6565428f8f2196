"""``luthier pretrain``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import heavy_imports, new_console, print_json, train_beside_first
from luthier.cli.options import (
    Adaptation,
    Json,
    LearningRate,
    Processes,
    Resume,
    recipe_fields,
    recipe_options,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.runs import Result


def pretrain(
    data: Annotated[
        list[str],
        typer.Argument(help="Files of raw text (.txt, .md, JSONL), or a recipe (.toml)."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="Id of the new base model; with an adaptation, name of the new custom model."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny, 3m, 10m, 30m or 135m weights.")] = None,
    from_base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Model to go on from (continued pre-training), instead of a new network."
        ),
    ] = None,
    adaptation: Adaptation = None,
    family: Annotated[str | None, typer.Option(help="llama, gpt2, palm or transfo_xl.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json to build from, instead of size and family.")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens of the tokenizer.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest input in tokens.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Raw text to measure on; may be repeated.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one step.")] = None,
    learning_rate: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe: KEY=VALUE, e.g. training.beta2=0.99."),
    ] = None,
    resume: Resume = False,
    processes: Processes = 1,
    json_: Json = False,
) -> None:
    """Train a base model on raw text.

    Training starts from random weights with a new tokenizer, or continues from --base. All weights of
    the base are trained unless --adaptation names an adapter. The text may exceed the memory.
    """
    options = recipe_options(locals())
    from luthier.pretrain_recipe import PretrainRecipe

    given = recipe_fields(data, options, set_)
    if "name" not in given:
        raise RecipeError("say what the base model that is made is called: --name my-base")
    recipe = PretrainRecipe.parse(given)
    # Loads torch, which takes seconds: only for a recipe that parses.
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.evaluation.significance import perplexity_of
        from luthier.workflows.pretrain import pretrain as train

    if train_beside_first(lambda: train(recipe, resume, processes=processes)):
        return
    with LiveReporter() as reporter:
        result = train(recipe, resume, reporter, processes)
    loss = result.validation_loss
    perplexity = None if loss is None else perplexity_of(loss)
    if json_:
        print_json(asdict(result) | {"perplexity": perplexity})
    else:
        _print(result, perplexity)


def _print(result: Result, perplexity: float | None) -> None:
    from luthier.cli.tune import loss_figures, print_verdict

    out = new_console(highlight=False, soft_wrap=True)
    held = ""
    if perplexity is not None:
        held = f"loss {result.validation_loss:.4f} (perplexity {perplexity:.1f})"
    kind = "an adapter" if ":" in result.model_id else "a base model here"
    out.print(f"\n[bold green]{result.model_id}[/bold green] is {kind}, stored and verified")
    speed = result.tokens / max(result.seconds, 1e-9)
    out.print(
        f"  {result.steps:,} steps, {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({speed:,.0f} a second); {loss_figures(result, held)}; "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    )
    print_verdict(result)
    out.print(f"  loss curve  {result.run_dir}/loss.png")
    out.print(f'  use it      luthier generate {result.model_id} "Once"')
    out.print(f"  tune it     luthier tune DATA --base {result.model_id}")
