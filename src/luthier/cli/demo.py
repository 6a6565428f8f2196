"""``luthier demo``: the main job on the sample data, with base and tuned replies side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from luthier.cli.console import new_console, print_json
from luthier.cli.options import Json

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation

BASE = "smollm2-135m-instruct"
UPPER_LAYERS = list(range(20, 30))
"""Of the base's 30."""
SHOWN = 4
"""Replies."""


def demo(json_: Json = False) -> None:
    """Tune the default model on the sample data."""
    from importlib.resources import as_file, files

    from luthier.cli.progress import LiveReporter
    from luthier.cli.tune import print_result
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
                # The upper third of the layers learns labels and voice as well as all of them, in half
                # of the time (docs/results.md).
                "adaptation": {"method": "lora", "layers_to_transform": UPPER_LAYERS},
                "training": {"epochs": 3, "evaluate_every": 27},
            }
        )
        with LiveReporter() as reporter:
            result = tune(recipe, Run(BASE, name).folder.exists(), reporter)
        if not json_:
            print_result(result)
        scores = {
            label: _measure(model, folder / "test.jsonl", label)
            for label, model in (("base", BASE), ("tuned", result.model_id))
        }
    if json_:
        report = {label: graded.scores for label, graded in scores.items()}
        print_json({"model_id": result.model_id, "seconds": result.seconds, "scores": report})
    else:
        _print(result.model_id, scores["base"], scores["tuned"])


def _measure(model_id: str, test: Path, label: str) -> Evaluation:
    """Scores of a model on unseen prompts."""
    from luthier.cli.progress import show_progress
    from luthier.graders import Answer, FirstLine, Grader
    from luthier.sdk.evaluation import evaluate

    class HouseStyle(Grader):
        """1 when the reply has a label line, and is signed as the sample's replies are."""

        method: Literal["house_style"] = "house_style"
        has_time_limit: ClassVar[bool] = False

        def score(self, answer: Answer) -> float:
            """1 or 0."""
            lines = answer.reply.strip().split("\n")
            labelled = lines[0].startswith("[route: ") and lines[0].endswith("]")
            signature = self.expected_of(answer).strip().split("\n")[-1]
            return float(labelled and lines[-1].strip() == signature)

    graders = {"routing label": FirstLine(), "house style": HouseStyle()}
    with show_progress(0, f"asking the {label} model") as done:
        return evaluate(model_id, test, graders, max_tokens=80, on_progress=done)


def _print(model_id: str, base: Evaluation, tuned: Evaluation) -> None:
    """Replies and scores side by side, and what to type next."""
    from rich.markup import escape
    from rich.table import Table

    out = new_console(highlight=False)
    out.print(
        f"\n[bold]Unseen customers, the same question to both[/bold]  ({time.strftime('%H:%M')})"
    )
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
