"""``luthier pretrain``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.console import LiveReporter, heavy_imports, print_json
from luthier.cli.tuning import print_verdict

if TYPE_CHECKING:
    from luthier.engine.runs import Result
    from luthier.pretraining import PretrainRecipe


def pretrain(
    data: Sequence[Path],
    flags: Mapping[str, Any],
    settings: Sequence[str],
    resume: bool,
    as_json: bool,
) -> None:
    """Build the recipe, run it, print the result."""
    recipe = recipe_of(data, flags, settings)
    # Loads torch, which takes seconds: only for a recipe that parses.
    with heavy_imports():
        from luthier.engine.pretrain import pretrain as run

    with closing(LiveReporter(quiet=as_json)) as reporter:
        result = run(recipe, resume, reporter)
    if as_json:
        print_json(asdict(result) | {"perplexity": perplexity(result)})
    else:
        print_result(result)


def recipe_of(
    data: Sequence[Path], flags: Mapping[str, Any], settings: Sequence[str]
) -> PretrainRecipe:
    """The recipe of text files or of one TOML file, with flags and ``--set`` applied in this order."""
    from luthier.pretraining import PretrainRecipe
    from luthier.recipe import assign, read_toml, set_field

    one = len(data) == 1 and data[0].suffix == ".toml"
    fields = read_toml(data[0]) if one else {"data": {"train": [str(path) for path in data]}}
    for key, value in flags.items():
        if value is not None:
            assign(fields, key.split("."), value)
    for setting in settings:
        set_field(fields, setting)
    return PretrainRecipe.parse(fields)


def perplexity(result: Result) -> float | None:
    """``exp`` of the validation loss."""
    loss = result.validation_loss
    return None if loss is None else math.exp(min(loss, 700.0))


def print_result(result: Result) -> None:
    """What a finished run came to, and what to type next."""
    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    held = perplexity(result)
    shown = (
        "" if held is None else f", validation {result.validation_loss:.4f} (perplexity {held:.1f})"
    )
    out.print(
        f"\n[bold green]{result.model_id}[/bold green] is a base model here, stored and verified"
    )
    speed = result.tokens / max(result.seconds, 1e-9)
    out.print(
        f"  {result.steps:,} steps, {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({speed:,.0f} a second); loss {result.train_loss:.4f}{shown}; "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB",
        soft_wrap=True,
    )
    print_verdict(result)
    out.print(f"  loss curve  {result.run_dir}/loss.png", soft_wrap=True)
    out.print(f'  use it      luthier generate {result.model_id} "Once"', soft_wrap=True)
    out.print(f"  tune it     luthier tune DATA --base {result.model_id}", soft_wrap=True)
