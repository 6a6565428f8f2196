"""Cutting of documents into passages."""

from __future__ import annotations

from luthier.documents.passages import WORDS, count_words, cut
from luthier.documents.readers import DocumentPage


def test_passage_has_its_headings_and_page() -> None:
    pages = [
        DocumentPage("# Travel\n\nIntro.\n\n## Hotels\n\nUp to 120 euros.", 1),
        DocumentPage("More.", 2),
    ]
    found = [(each.heading, each.text, each.page) for each in cut(pages)]
    assert found == [
        ("Travel", "Intro.", 1),
        ("Travel > Hotels", "Up to 120 euros.", 1),
        ("Travel > Hotels", "More.", 2),
    ]


def test_long_paragraph_is_cut_at_sentences() -> None:
    text = " ".join(f"Sentence number {n} has six words." for n in range(100))
    passages = [*cut([DocumentPage(text)])]
    assert all(count_words(each.text) <= WORDS for each in passages)
    assert all(each.text.endswith(".") for each in passages)
    assert " ".join(each.text for each in passages) == text


def test_part_of_long_table_repeats_the_head() -> None:
    rows = "\n".join(f"| city {n} | {n} |" for n in range(100))
    passages = [*cut([DocumentPage(f"| city | price |\n| --- | --- |\n{rows}")])]
    assert len(passages) > 1
    assert all(each.text.startswith("| city | price |\n| --- |") for each in passages)


def test_text_without_spaces_is_cut() -> None:
    passages = [*cut([DocumentPage("漢" * 1000)])]
    assert all(count_words(each.text) <= WORDS for each in passages)
    assert "".join(each.text for each in passages) == "漢" * 1000


def test_passages_have_all_words_in_order() -> None:
    text = "\n".join(f"line {n} " + "word " * (n % 40) for n in range(60)) + " long" * 500
    passages = [*cut([DocumentPage(text)])]
    assert " ".join(each.text for each in passages).split() == text.split()
    assert max(count_words(each.text) for each in passages) <= WORDS
    assert [*cut([DocumentPage("")])] == []


def test_comment_in_code_is_no_heading() -> None:
    text = "# Setup of C#\n\n```sh\n# create a folder\nmkdir a\n```\n\nDone."
    (passage,) = cut([DocumentPage(text)])
    assert passage.heading == "Setup of C#" and "# create a folder" in passage.text


def test_heading_without_text_is_a_passage() -> None:
    pages = [
        DocumentPage("# Hours\n\n## Closed on Monday\n\n## Tuesday\n\nFrom nine.\n\n# Fees", 1),
        DocumentPage("Ten euros.\n\n# End", 2),
    ]
    found = [(each.heading, each.text, each.page) for each in cut(pages)]
    assert found == [
        ("Hours", "Closed on Monday", 1),
        ("Hours > Tuesday", "From nine.", 1),
        ("Fees", "Ten euros.", 2),
        ("", "End", 2),
    ]
