"""Write the rows of the use case of brand copy: product texts, and texts in another voice.

    python benchmarks/brand_rows.py DATA/luma_copy

Products without facts are left out: a text without facts can only be invented. The classifier of voice
learns three texts of each product: the shop's own ("ours"), the facts as plain sentences, and a text of
the base model that was not tuned ("other").
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from defaults import rows_of, write_packed, write_rows

TARGET = Path(__file__).parent.parent / "src" / "luthier" / "examples" / "brand-copy"


def plain_facts(prompt: str) -> str:
    """Return the facts of a prompt as sentences."""
    name = re.search(r"Product: (.*)", prompt)
    facts = re.split(r"\n- |\u2022", prompt.split("Facts:", 1)[1])
    sentences = [fact.strip().rstrip(".") + "." for fact in facts if fact.strip()]
    return " ".join([f"{name.group(1)}." if name else "", *sentences])


def base_replies(rows: list[dict[str, Any]]) -> list[str]:
    """Return the texts of the base model."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = write_rows(rows, Path(folder, "rows.jsonl")), Path(folder, "replies.jsonl")
        subprocess.run(
            ["luthier", "evaluate", "smollm2-135m-instruct", str(data), "--max-tokens", "80",
             "--grader", "first_line", "--output", str(output)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return [" ".join(each["reply"].split()) for each in rows_of(output)]


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for split, voice in (("train", "voice"), ("test", "voice-test")):
        rows = [
            {name: row[name] for name in ("prompt", "completion")}
            for row in rows_of(Path(sys.argv[1]) / f"{split}.jsonl") if "Facts:" in row["prompt"]
        ]  # fmt: skip
        texts = [
            {"text": text, "label": label}
            for row, reply in zip(rows, base_replies(rows), strict=True)
            for text, label in (
                (row["completion"], "ours"), (plain_facts(row["prompt"]), "other"), (reply, "other"),
            ) if text
        ]  # fmt: skip
        for name, some in ((split, rows), (voice, texts)):
            write_packed(some, TARGET / f"{name}.jsonl.xz")


if __name__ == "__main__":
    main()
