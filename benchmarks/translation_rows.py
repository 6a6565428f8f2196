"""Write the rows of the use case of translation: short everyday sentences.

    python benchmarks/translation_rows.py DATA/tatoeba_en_vi

The first 400 training sentences and the first 60 test sentences of at most eight words. Test rows
keep all their translations.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from defaults import rows_of, write_packed

TARGET = Path(__file__).parent.parent / "src" / "luthier" / "examples" / "translation"
MOST_WORDS = 8
SYSTEM = "Translate to Vietnamese."


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for split, count in (("train", 400), ("test", 60)):
        rows: list[dict[str, Any]] = []
        for row in rows_of(Path(sys.argv[1]) / f"{split}.jsonl"):
            if len(row["en"].split()) <= MOST_WORDS:
                prompt = f"{SYSTEM} {row['en']}"
                rows.append({"prompt": prompt, "completion": row["vi"], "source": row["source"]})
        write_packed(rows[:count], TARGET / f"{split}.jsonl.xz")


if __name__ == "__main__":
    main()
