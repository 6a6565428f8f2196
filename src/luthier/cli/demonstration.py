"""``luthier demo``: the main job on the sample data, with base and tuned replies side by side."""

from __future__ import annotations

import time
from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.cli.console import LiveReporter, counting, print_json
from luthier.cli.tuning import print_result
from luthier.graders import Answer, FirstLine, Grader

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation

BASE = "smollm2-135m-instruct"
UPPER_LAYERS = list(range(20, 30))
"""Of the base's 30."""
SHOWN = 4


def run(as_json: bool) -> None:
    """Tune, measure before and after on unseen prompts, show, and say what to type next."""
    from luthier.engine.runs import Run
    from luthier.engine.train import train
    from luthier.recipe import Recipe
    from luthier.store.models import custom_folder

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
        with closing(LiveReporter(quiet=as_json)) as reporter:
            result = train(recipe, Run(BASE, name).folder.exists(), reporter)
        if not as_json:
            print_result(result)
        scores = {
            label: _measure(model, folder / "test.jsonl", label, as_json)
            for label, model in (("base", BASE), ("tuned", result.model_id))
        }
    report = {label: graded.scores for label, graded in scores.items()}
    if as_json:
        print_json({"model_id": result.model_id, "seconds": result.seconds, "scores": report})
    else:
        _show(result.model_id, scores)


def _measure(model_id: str, test: Path, label: str, quiet: bool) -> Evaluation:
    from luthier.data.rows import load_rows
    from luthier.serving.generation import Generator
    from luthier.serving.measuring import measure
    from luthier.store.models import find

    rows = load_rows(test)
    generator = Generator.open(find(model_id))
    graders = {"routing label": FirstLine(), "house style": HouseStyle()}
    with counting(len(rows), f"asking the {label} model", quiet) as done:
        return measure(generator, rows, graders, 80, done)


class HouseStyle(Grader):
    """1 when the reply has a label line, and is signed as the sample's replies are."""

    method: Literal["house_style"] = "house_style"
    watched = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        lines = answer.reply.strip().split("\n")
        labelled = lines[0].startswith("[route: ") and lines[0].endswith("]")
        signature = self.expected_of(answer).strip().split("\n")[-1]
        return float(labelled and lines[-1].strip() == signature)


def _show(model_id: str, scores: dict[str, Any]) -> None:
    from rich.table import Table

    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    out.print(
        f"\n[bold]Unseen customers, the same question to both[/bold]  ({time.strftime('%H:%M')})"
    )
    table = Table("customer", "base model", model_id, show_lines=True, expand=True)
    for before, after in list(zip(scores["base"].answers, scores["tuned"].answers, strict=True))[
        :SHOWN
    ]:
        table.add_row(before.prompt, before.reply, f"[green]{_plain(after.reply)}[/green]")
    out.print(table)
    table = Table(f"on {scores['base'].rows} unseen rows", "base", "tuned", box=None)
    for name in scores["base"].scores:
        values = [f"{scores[label].scores[name]:.0%}" for label in ("base", "tuned")]
        table.add_row(name, values[0], f"[bold green]{values[1]}[/bold green]")
    out.print(table)
    out.print("\nNext:")
    for text in (
        f"luthier chat {model_id}",
        f'luthier generate {model_id} "My front wheel wobbles"',
        f"luthier models export {model_id} ./support --merged",
        "luthier tune YOUR.jsonl --name my-first-model",
    ):
        out.print(f"  {text}", soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
