"""Search for follow-up questions: the last message alone, or with the message before.

    python benchmarks/follow_ups.py XQUAD INDEX

``XQUAD`` is train.en.jsonl of XQuAD, and ``INDEX`` an index of the English articles. Each pair below
is a question of XQuAD and a short follow-up about the same paragraph. As control, each question of the
pairs also follows a question about another article. Printed are shares of the answers among the first
four passages, and of the accepted questions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.cli.documents import open_retriever
from luthier.documents.answers import PASSAGES, search_text
from luthier.types import Message

PAIRS = (
    ("How many career sacks did Jared Allen have?", "And tackles of Luke Kuechly?", "118"),
    ("How many points did the Panthers defense surrender?", "And how many sacks by Short?", "11"),
    ("What year did Tesla die? ", "And where did he live?", "hotels"),
    ("What is the name of the spiritual teacher in Hinduism?", "Who do they control?", "disciples"),
    ("What work of Luther's became popular?", "Who made the woodcuts?", "Cranach"),
    ("How many extended metropolitan areas are there?", "And the population of each?", "five million"),
    ("What proclamation abolished protestantism in France?", "And when?", "1685"),
    ("What proclamation abolished protestantism in France?", "By which king?", "Louis XIV"),
    ("What German ruler invited Huguenot immigration?", "And which poet?", "Theodor Fontane"),
    ("What modern company has been notably working on a steam engine using modern materials?",
     "Where is it based?", "Sweden"),
    ("Where is Energiprojekt AB based?", "How many cylinders?", "5"),
    ("What group of scientists seek to measure the amounts of oxygen in marine animals?",
     "How much heavier is it?", "12%"),
    ("Who led the committee established by Seaman?", "And when was it established?", "July 1961"),
    ("Who compiled the original surviving Apollo 11 landing data?", "Which company restored it?",
     "Lowry"),
    ("When did the Cretaceous-Paleogene extinction happen?", "How old are the fossils?", "515"),
    ("What is another name for the west side of Fresno?", "In which direction is it?", "southwest"),
    ("What earlier market did the Grainger Market replace?", "How many guests came?", "2000"),
    ("What earlier market did the Grainger Market replace?", "When did the first one open?", "1835"),
    ("What is the process of constructing a building or infrastructure?", "And its share of GDP?",
     "six to nine"),
    ("Who mapped the St. Johns River in 1562?", "For what nation?", "France"),
    ("Who mapped the St. Johns River in 1562?", "And who attacked in 1565?", "Avilés"),
    ("What does Doctor Who do when his body is mortally damaged?", "And who travels with him?",
     "human"),
    ("Who is the chair of the IPCC?", "And the first one?", "Bert Bolin"),
    ("What Microsoft CEO is also an alumni of the University of Chicago?", "And of Oracle?",
     "Larry Ellison"),
    ("When did Kibaki and Odinga sing an agreement on the formation of government?",
     "What was his role?", "Prime Minister"),
    ("Who provided a philosophical discussion of force?", "How many elements did he know?", "four"),
    ("What type of group is The Islamic State?", "And who leads it?", "Sunni Arabs"),
)  # fmt: skip


def main(xquad: str, index: str) -> None:
    """Print a line for each way to search."""
    rows = [json.loads(line) for line in Path(xquad).read_text().splitlines()]
    contexts = {row["question"]: row["context"] for row in rows}
    answers = {row["question"]: row["answers"][0]["text"] for row in rows}
    pairs = PAIRS
    far = [(pairs[(n + 9) % len(pairs)][0], first) for n, (first, _, _) in enumerate(pairs)]
    ways: dict[str, Callable[[Sequence[Message]], str]] = {
        "last message": lambda turns: turns[-1].content,
        "last two messages": lambda turns: f"{turns[0].content} {turns[-1].content}",
        "two messages if the last is short": search_text,
    }
    with open_retriever(index) as retriever:
        for name, text in ways.items():
            counts = []
            follow_ups = [(first, last, answer, contexts[first]) for first, last, answer in pairs]
            controls = [(one, last, answers[last], contexts[last]) for one, last in far]
            for cases in (follow_ups, controls):
                found = accepted = 0
                for first, last, answer, context in cases:
                    asked = text([Message("user", first), Message("user", last)])
                    passages, may_answer = retriever.search(asked, PASSAGES)
                    words = {*context.split()}
                    accepted += may_answer
                    found += any(
                        answer in each.passage.text
                        and len(words & {*each.passage.text.split()}) > 0.5 * len(words)
                        for each in passages
                    )
                counts.append(
                    f"{found / len(cases):.0%} found, {accepted / len(cases):.0%} accepted"
                )
            print(f"{name}: follow-ups {counts[0]}; new topics {counts[1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
