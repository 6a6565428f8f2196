"""False alarms and power of the test for input drift, on texts of banking77.

    python benchmarks/input_drift.py ../shared/data/banking77 --weeks 200

Drift is a share of inputs from 10 classes that the training rows do not have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from luthier.models import TEXT_ENCODER
from luthier.server.live import drift

CLASSES, NEW_CLASSES = 40, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weeks", type=int, default=200)
    parser.add_argument("--drift-weeks", type=int, default=40)
    arguments = parser.parse_args()
    lines = [line for path in sorted(arguments.folder.glob("*.jsonl")) for line in path.open()]
    rows = [json.loads(line) for line in lines]
    random = np.random.default_rng(0)
    random.shuffle(rows)
    labels = sorted({row["label"] for row in rows})
    known, unknown = labels[:CLASSES], labels[CLASSES : CLASSES + NEW_CLASSES]
    old = [row["text"] for row in rows if row["label"] in known][:3600]
    new = [row["text"] for row in rows if row["label"] in unknown][:600]
    for features in (drift.WORDS, TEXT_ENCODER):
        old_ND, new_ND = (drift.features_of(texts, features) for texts in (old, new))

        def week(inputs: int, share: float, old_ND: Any = old_ND, new_ND: Any = new_ND) -> Any:
            mine, other = random.permutation(len(old_ND)), random.permutation(len(new_ND))
            count = round(share * inputs)
            recent = [old_ND[mine[1000 : 1000 + inputs - count]], new_ND[other[:count]]]
            auc, error, _ = drift.two_sample_auc(old_ND[mine[:1000]], np.concatenate(recent))
            return auc, auc - 1.96 * error > 0.5 and auc >= drift.FLOOR

        for inputs, share, count in (
            (200, 0, arguments.weeks), (50, 0, arguments.weeks // 2),
            *((200, share, arguments.drift_weeks) for share in (0.1, 0.2, 0.3, 0.5)),
        ):  # fmt: skip
            found = np.array([week(inputs, share) for _ in range(count)], dtype=float)
            alarms = found[:, 1]
            both = np.maximum(alarms[::2], alarms[1::2]).mean()
            print(
                f"{features}: {inputs} inputs, {share:.0%} new: AUC {found[:, 0].mean():.3f}, "
                f"alarms {alarms.mean():.1%} of weeks, {both:.0%} of two weeks"
            )


if __name__ == "__main__":
    main()
