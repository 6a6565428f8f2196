"""Results of `luthier compare` on tasks with different best methods.

    python benchmarks/tuning_vs_prompting.py DATA [--task banking77] [--rows 200]

Labels (`banking77` with 20 rows per label, `sib200_vi`): a tuned MiniLM and a tuned SmolLM2-135M
against SmolLM2 with prompting, with fixed and retrieved examples, and against the simple baselines.
Questions on documents (`xquad_en`, `xquad_vi`): SmolLM2 without tuning, with passages, tuned on
questions alone, and tuned with passages; each test question belongs to one of about 200 passages.
The score is ROUGE-L. Each run has a temporary LUTHIER_HOME. Prints a table and the verdict per
task.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from defaults import (
    DECODER,
    ENCODER,
    Rows,
    first_of_each_label,
    new_home,
    rows_of,
    run_luthier,
    write_rows,
)

QUESTION = "Answer in a few words."
GRADERS = """
[rouge_l]
method = "text_similarity"
evaluation_metric = "rouge_l"
reference = "{{item.expected}}"
"""


def spread(rows: Rows, count: int) -> Rows:
    """Return ``count`` rows spread over a file sorted by labels."""
    return [rows[place * len(rows) // count] for place in range(min(count, len(rows)))]


def as_answers(rows: Rows) -> Rows:
    return [
        {"prompt": f"{row['question']} {QUESTION}", "completion": row["answers"][0]["text"]}
        for row in rows
    ]


def compare_labels(data: Path, folder: Path, task: str, count: int) -> dict[str, Any]:
    home = new_home(folder)
    rows = rows_of(data / task / "train.jsonl")
    train = write_rows(
        first_of_each_label(20)(rows) if task == "banking77" else rows, folder / "train.jsonl"
    )
    test = write_rows(spread(rows_of(data / task / "test.jsonl"), count), folder / "test.jsonl")
    for base in (ENCODER, DECODER):
        run_luthier(home, "tune", str(train), "--base", base, "--name", "tuned")
    return run_luthier(
        home, "compare", str(test), "--base", DECODER, "--train", str(train),
        "--tuned", f"{ENCODER}:tuned", "--tuned", f"{DECODER}:tuned", "--encoder", ENCODER,
        "--max-tokens", "16",
    )  # fmt: skip


def compare_answers(data: Path, folder: Path, task: str, count: int) -> dict[str, Any]:
    home, language = new_home(folder), task.removeprefix("xquad_")
    train, test = (
        write_rows(as_answers(rows), folder / f"{part}.jsonl")
        for part, rows in (
            ("train", rows_of(data / "xquad" / f"train.{language}.jsonl")),
            ("test", spread(rows_of(data / "xquad" / f"test.{language}.jsonl"), count)),
        )
    )
    passages = [
        {"text": row["text"]}
        for row in rows_of(data / "xquad" / "corpus.jsonl")
        if row["lang"] == language
    ]
    documents = write_rows(passages, folder / "documents.jsonl")
    graders = folder / "graders.toml"
    graders.write_text(GRADERS)
    run_luthier(home, "tune", str(train), "--base", DECODER, "--name", "tuned")
    return run_luthier(
        home, "compare", str(test), "--tuned", f"{DECODER}:tuned", "--documents", str(documents),
        "--grader", str(graders), "--max-tokens", "24",
        "--encoder", ENCODER,
    )  # fmt: skip


TASKS = {
    "banking77": compare_labels,
    "sib200_vi": compare_labels,
    "xquad_en": compare_answers,
    "xquad_vi": compare_answers,
}


def table(task: str, found: dict[str, Any]) -> str:
    lines = [
        f"### {task}, {found['rows']:,} rows, {found['measure']}", "",
        "| way | score | interval | ms an answer | before, s |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for each in found["contenders"]:
        low, high = each["interval"]
        before = each.get("preparation_seconds")
        lines.append(
            f"| {each['name']} | {each['score']:.1%} | {low:.1%} to {high:.1%} | "
            f"{1000 * each['seconds']:,.0f} | {'' if before is None else f'{before:,.0f}'} |"
        )
    return "\n".join([*lines, "", found["verdict"], "", *found["remarks"], ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--task", action="append", choices=TASKS, help="all when not given")
    parser.add_argument("--rows", type=int, default=200, help="test rows of each task at most")
    arguments = parser.parse_args()
    for task in arguments.task or TASKS:
        with tempfile.TemporaryDirectory() as folder:
            found = TASKS[task](arguments.data, Path(folder), task, arguments.rows)
        print(table(task, found), flush=True)


if __name__ == "__main__":
    main()
