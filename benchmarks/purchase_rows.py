"""Write the rows of the use case of recommendation: purchases of a bicycle shop.

    python benchmarks/purchase_rows.py

A customer has one bicycle, of six kinds, and one or two habits of four. Purchases are drawn without
repetition: from the items of the kind, of the habits, and from items for everyone. Popular items of
each list come first. Items, shop and customers are invented. Nothing was changed after the first run
of a model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from defaults import write_packed

TARGET = Path(__file__).parent.parent / "src" / "luthier" / "examples" / "recommendation"
PARTS = (
    "tyre", "inner tube", "brake pads", "chain", "saddle", "pedals", "handlebar tape", "wheel set",
    "cassette", "bottle cage", "frame bag", "mudguards",
)  # fmt: skip
KINDS = ("road", "trail", "city", "gravel", "folding", "cargo")
HABITS = {
    "commuting": "front light|rear light|rain jacket|pannier|folding lock|reflective vest|thermos",
    "racing": "heart rate belt|race number holder|energy gel|aero helmet|skin suit|power meter",
    "touring": "tent|front rack|rear rack|camping stove|dynamo hub|map holder|sleeping mat",
    "family": "child seat|trailer|child helmet|bicycle bell|balance bike|kick stand|wimple flag",
}
EVERYONE = "pump|tyre levers|chain oil|repair kit|multi tool|helmet|gloves|cleaner|lock|bottle"
CUSTOMERS, TEST = 1_500, 400


def weights(count: int) -> NDArray[np.float64]:
    """Return probabilities that fall with the place."""
    found: NDArray[np.float64] = 1 / np.arange(1, count + 1) ** 0.7
    found /= found.sum()
    return found


def customer(random: np.random.Generator) -> list[str]:
    """Return the purchases of a customer, in order."""
    kind = KINDS[random.choice(len(KINDS), p=weights(len(KINDS)))]
    habits = random.choice(len(HABITS), random.integers(1, 3), replace=False)
    lists = [
        [f"{kind} {part}" for part in PARTS],
        *([*HABITS.values()][habit].split("|") for habit in habits),
        EVERYONE.split("|"),
    ]
    shares = np.array([0.45, *[0.3 / len(habits)] * len(habits), 0.25])
    bought = list[str]()
    size = int(random.integers(4, 10))
    while len(bought) < size:
        items = lists[random.choice(len(lists), p=shares)]
        item = items[random.choice(len(items), p=weights(len(items)))]
        if item not in bought:
            bought.append(item)
    return bought


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    items = [f"{kind} {part}" for kind in KINDS for part in PARTS]
    items += [item for names in (*HABITS.values(), EVERYONE) for item in names.split("|")]
    (TARGET / "catalogue.txt").write_text("\n".join(items) + "\n")
    random = np.random.default_rng(2026)
    for name, count in (("train", CUSTOMERS), ("test", TEST)):
        rows = [customer(random) for _ in range(count)]
        packed = [{"history": row[:-1], "item": row[-1]} for row in rows]
        write_packed(packed, TARGET / f"{name}.jsonl.xz")


if __name__ == "__main__":
    main()
