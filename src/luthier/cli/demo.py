"""``luthier demo``: tuning on the sample data, with base and tuned replies side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.cli.terminal.console import new_console

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result
    from luthier.evaluation.evaluate import Evaluation

BASE = "smollm2-135m-instruct"
UPPER_LAYERS = list(range(20, 30))
"""Last third of the base's 30 layers."""
SHOWN = 4
"""Number of printed replies."""


@dataclass(frozen=True)
class Demo:
    """The tuned model, and the replies of both models to unseen prompts."""

    result: Result
    base: Evaluation
    tuned: Evaluation

    def plain(self) -> dict[str, Any]:
        """Return model id, seconds and scores."""
        scores = {"base": self.base.scores, "tuned": self.tuned.scores}
        return {"model_id": self.result.model_id, "seconds": self.result.seconds, "scores": scores}


def demo(*, reporter: Reporter | None = None) -> Demo:
    """Tune the default model on the sample data."""
    from importlib.resources import as_file, files

    from luthier.engine.runs import Run
    from luthier.library.folders import custom_folder
    from luthier.recipe import Recipe
    from luthier.workflows.tuning import tune

    with as_file(files("luthier") / "demo") as folder:
        number = 1
        while custom_folder(BASE, f"support-v{number}").exists():
            number += 1
        name = f"support-v{number}"
        recipe = Recipe.parse(
            {
                "base": BASE,
                "name": name,
                "data": {
                    "train": str(folder / "train.jsonl"),
                    "validation": str(folder / "validation.jsonl"),
                },
                # The last third of the layers learns labels and voice as well as all layers, in half
                # the time (docs/results.md).
                "adaptation": {"method": "lora", "layers_to_transform": UPPER_LAYERS},
                "training": {"epochs": 3, "evaluate_every": 27},
            }
        )
        result = tune(recipe, Run(BASE, name).folder.exists(), reporter)
        test = folder / "test.jsonl"
        base, tuned = (_measure(model, test, reporter) for model in (BASE, result.model_id))
    return Demo(result, base, tuned)


def _measure(model_id: str, test: Path, reporter: Reporter | None = None) -> Evaluation:
    """Evaluate a model on unseen prompts."""
    from luthier.cli.evaluate import evaluate
    from luthier.graders import Answer, FirstLine, Grader

    class HouseStyle(Grader):
        """Score 1 for a reply with a label line and the signature of the sample data."""

        method: Literal["house_style"] = "house_style"
        has_time_limit: ClassVar[bool] = False

        def score(self, answer: Answer) -> float:
            lines = answer.reply.strip().split("\n")
            labelled = lines[0].startswith("[route: ") and lines[0].endswith("]")
            signature = self.expected_of(answer).strip().split("\n")[-1]
            return float(labelled and lines[-1].strip() == signature)

    graders = {"routing label": FirstLine(), "house style": HouseStyle()}
    return evaluate(model_id, test, graders=graders, max_tokens=80, reporter=reporter)


def show_demo(found: Demo) -> None:
    """Print the run, the replies and the next commands."""
    from luthier.cli.tune import print_result

    print_result(found.result)
    print_replies(found.result.model_id, found.base, found.tuned)


def print_replies(model_id: str, base: Evaluation, tuned: Evaluation) -> None:
    """Print replies and scores side by side, and the next commands."""
    from rich.markup import escape
    from rich.table import Table

    out = new_console(highlight=False)
    out.print(f"\n[bold]Unseen prompts[/bold]  ({time.strftime('%H:%M')})")
    table = Table("customer", "base model", model_id, show_lines=True, expand=True)
    for before, after in list(zip(base.records, tuned.records, strict=True))[:SHOWN]:
        replies = escape(before["reply"]), f"[green]{escape(after['reply'])}[/green]"
        table.add_row(escape(before["prompt"]), *replies)
    out.print(table)
    table = Table(f"on {len(base.rows)} unseen rows", "base", "tuned", box=None)
    for name, score in base.scores.items():
        table.add_row(name, f"{score:.0%}", f"[bold green]{tuned.scores[name]:.0%}[/bold green]")
    out.print(table)
    out.print("\nNext:")
    for text in (
        f"luthier chat {model_id}",
        f'luthier generate {model_id} "My front wheel wobbles"',
        f"luthier models export {model_id} ./support --merged",
        "luthier tune YOUR.jsonl --name my-first-model",
    ):
        out.print(f"  {text}", soft_wrap=True)
