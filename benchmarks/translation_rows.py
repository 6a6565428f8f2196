"""Write the rows of the use case of translation: short everyday sentences.

    python benchmarks/translation_rows.py DATA/tatoeba_en_vi

The first 400 training sentences and the first 60 test sentences of at most eight words. Test rows
keep all their translations.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from defaults import rows_of

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
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:count])
        (TARGET / f"{split}.jsonl.xz").write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    main()
