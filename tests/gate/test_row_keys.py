"""Groups of rows with equal input, unless most rows are equal."""

from __future__ import annotations

from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import History, LabelledText, TextPair
from luthier.gate.row_keys import RelatedRows, group_related, match_questions
from luthier.types import Row

LONG = "please tell me when the parcel that I ordered at the end of last week will be delivered"


def rows(*texts: str) -> list[Row]:
    return [
        LabelledText("f", line, text=text, label=str(line)) for line, text in enumerate(texts, 1)
    ]


def test_similar_prompts_are_grouped() -> None:
    texts = [LONG, "yes", "no", LONG + " now", "Yes.", "maybe", "what else"]
    assert group_related(rows(*texts)).tolist() == [0, 1, 2, 0, 1, 5, 6]
    related = RelatedRows(limit=0)
    related.add(rows(*texts)[:4])
    related.add(rows(*texts)[4:])
    assert related.groups().tolist() == group_related(rows(*texts)).tolist()


def test_a_group_of_most_rows_is_taken_apart() -> None:
    near = [f"{LONG} {word}" for word in ("now", "soon", "today", "tomorrow", "now", "please")]
    assert group_related(rows(*near, "yes")).tolist() == [0, 1, 2, 3, 0, 5, 6]
    assert group_related(rows("yes", "yes", "yes", "no")).tolist() == [0, 1, 2, 3]
    assert group_related([]).tolist() == []


def test_pairs_with_same_positive_are_grouped() -> None:
    anchors = ["where is it", "who wrote this", "how much does that cost", "when was it"]
    positives = ["In Rome.", "Ann did.", "Ten euros.", "In  rome."]
    pairs = [
        TextPair("f", line, text=anchor, positive=positive)
        for line, (anchor, positive) in enumerate(zip(anchors, positives, strict=True), 1)
    ]
    assert group_related(pairs).tolist() == [0, 1, 2, 0]


def test_questions_with_same_context_are_grouped() -> None:
    contexts = ["It is in Rome.", "It is in Ghent.", "It is in  Rome", "Ann did."]
    found = group_related(
        [AnsweredQuestion("f", line, f"{line}?", each) for line, each in enumerate(contexts, 1)]
    )
    assert found.tolist() == [0, 1, 0, 3]


def test_match_questions_stops_reading_after_last_match() -> None:
    asked = rows("What is it?", "who was it", "what is  it", "")
    train = iter(rows("when was it", "what is it", "What is it", "who was it", "never read"))
    assert match_questions(asked, train) == {0: "f:2", 1: "f:4", 2: "f:2"}
    assert [row.line for row in train] == [5]


def test_short_histories_of_other_people_are_no_repetition() -> None:
    items = [f"item {n}" for n in range(6)]

    def history(file: str, count: int) -> list[Row]:
        return [History(file, 1, "\n".join(items[:count]), "next")]

    assert match_questions(history("new", 3), history("old", 3)) == {}
    assert match_questions(history("old", 3), history("old", 3)) == {0: "old:1"}
    assert match_questions(history("new", 6), history("old", 6)) == {0: "old:1"}
