"""The index of documents: search, updates and interrupted updates."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.data.conversations.citations import INSTRUCTIONS, add_passages
from luthier.documents.answers import (
    DocumentAnswer,
    search_text,
    submit_passages,
    without_unknown_citations,
)
from luthier.documents.index import DocumentIndex, FoundPassage, open_file
from luthier.documents.passages import Passage
from luthier.documents.readers import document_files
from luthier.documents.retriever import calibrate
from luthier.errors import CorruptFile, DiskFull, RecipeError
from luthier.evaluation.retrieval import reciprocal_rank_fusion
from luthier.types import Message

pytestmark = pytest.mark.usefixtures("luthier_home")

MODEL: Any = SimpleNamespace(id="letters", content_hash="1")
OTHER: Any = SimpleNamespace(id="more-letters", content_hash="2")


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return shares of letters as embeddings."""
    counts = [[text.lower().count(chr(97 + n)) + 1e-3 for n in range(26)] for text in texts]
    count_NH = np.array(counts, np.float32)
    unit_NH: NDArray[np.float32] = count_NH / np.linalg.norm(count_NH, axis=1, keepdims=True)
    return unit_NH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "travel.md").write_text(
        "# Hotels\n\nA night may cost 120 euros.\n\n# Trains\n\nOnly second class."
    )
    (folder / "leave.txt").write_text("Everybody has thirty days of holiday each year.")
    return folder


def build(folder: Path, model: Any = MODEL, language: str = "en") -> Any:
    with DocumentIndex.update("handbook", model, language) as index:
        return index.synchronize(document_files([folder]), [folder], embed)


def search(question: str) -> list[FoundPassage]:
    with DocumentIndex.open("handbook") as index:
        return index.search(question, embed([question])[0], 2)


def test_search_finds_passage_with_its_place(folder: Path) -> None:
    update = build(folder)
    assert (update.added, update.problems) == (2, [])
    best = search("What may a hotel night cost?")[0]
    assert best.passage == Passage("A night may cost 120 euros.", "Hotels", None)
    assert best.place == "travel.md, Hotels" and best.document == str(folder / "travel.md")
    assert best.cosine == pytest.approx(
        float(embed([best.passage.content])[0] @ embed(["What may a hotel night cost?"])[0]),
        abs=1e-3,
    )


def test_update_reads_changes_alone(folder: Path) -> None:
    build(folder)
    (folder / "leave.txt").write_text("Everybody has thirty-one days of holiday.")
    (folder / "travel.md").unlink()
    (folder / "new.md").write_text("Parking is free.")
    update = build(folder)
    assert (update.added, update.changed, update.removed, update.unchanged) == (1, 1, 1, 0)
    assert [each.passage.text for each in search("holiday")] == [
        "Everybody has thirty-one days of holiday.", "Parking is free."
    ]  # fmt: skip
    os.utime(folder / "new.md", (1, 1))
    assert build(folder).unchanged == 2


def test_search_while_a_document_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)

    def replace(*given: Any) -> list[int]:
        (folder / "leave.txt").write_text("Everybody has thirty-one days of holiday.")
        assert build(folder).changed == 1
        return reciprocal_rank_fusion(*given)

    with DocumentIndex.open("handbook") as index:
        with monkeypatch.context() as patch:
            patch.setattr("luthier.documents.index.reciprocal_rank_fusion", replace)
            found = index.search("holiday", embed(["holiday"])[0], 1)[0]
        assert found.passage.text == "Everybody has thirty days of holiday each year."
        found = index.search("holiday", embed(["holiday"])[0], 1)[0]
        assert found.passage.text == "Everybody has thirty-one days of holiday."


def test_documents_of_another_folder_stay(folder: Path, tmp_path: Path) -> None:
    build(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "more.md").write_text("Coffee is free.")
    assert build(other).removed == 0
    with DocumentIndex.open("handbook") as index:
        assert len(index.documents()) == 3


def test_killed_update_continues(folder: Path) -> None:
    def fail_at_second(texts: Sequence[str]) -> NDArray[np.float32]:
        if "thirty" not in texts[0]:
            raise KeyboardInterrupt
        return embed(texts)

    with pytest.raises(KeyboardInterrupt), DocumentIndex.update("handbook", MODEL, "en") as index:
        index.synchronize(document_files([folder]), [folder], fail_at_second)
    with pytest.raises(RecipeError, match="unfinished"):
        search("holiday")  # not in use before it is complete
    assert DocumentIndex.unfinished("handbook") == [("letters", 1)]
    update = build(folder)
    assert (update.added, update.unchanged) == (1, 1)
    assert DocumentIndex.unfinished("handbook") == []


def test_killed_switch_of_the_model_continues_after_an_update(folder: Path) -> None:
    def kill(done: int, total: int) -> None:
        raise KeyboardInterrupt

    build(folder)
    with pytest.raises(KeyboardInterrupt), DocumentIndex.update("handbook", OTHER, "en") as index:
        index.synchronize(document_files([folder]), [folder], embed, kill)
    assert build(folder).unchanged == 2
    assert DocumentIndex.unfinished("handbook") == [("more-letters", 1)]
    assert build(folder, OTHER).unchanged == 1
    with DocumentIndex.open("handbook") as index:
        assert index.model == "more-letters"


def test_other_embedding_model_replaces_the_index_at_the_end(folder: Path) -> None:
    build(folder)
    with DocumentIndex.update("handbook", OTHER, "en") as index:
        with DocumentIndex.open("handbook") as old:
            assert old.model == "letters"
        index.synchronize(document_files([folder]), [folder], embed)
    with DocumentIndex.open("handbook") as index:
        assert index.model == "more-letters"
    assert len([*DocumentIndex.folder("handbook").glob("*.sqlite")]) == 1


def test_full_disk_has_its_own_error(tmp_path: Path) -> None:
    script = "PRAGMA max_page_count=1; CREATE TABLE large (content);"
    with pytest.raises(DiskFull), open_file(tmp_path / "full", may_create=True) as connection:
        connection.executescript(script)


def test_error_of_sqlite_on_full_disk_names_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError), open_file(folder / "missing"):
        pass
    monkeypatch.setattr("luthier.documents.index.LEAST_FREE", 1 << 62)
    with pytest.raises(DiskFull), open_file(folder / "missing"):
        pass


def test_second_writer_is_refused(folder: Path) -> None:
    with DocumentIndex.update("handbook", MODEL, "en"), pytest.raises(RecipeError, match="writes"):
        build(folder)


def test_tones_are_different_words(tmp_path: Path) -> None:
    folder = tmp_path / "menu"
    folder.mkdir()
    (folder / "a.md").write_text("bán phở")
    (folder / "b.md").write_text("bàn pho mát")
    build(folder, language="vi")
    with DocumentIndex.open("handbook") as index:
        assert len(index._by_words("phở")) == 1


def test_languages_without_spaces_are_searched_by_characters(tmp_path: Path) -> None:
    folder = tmp_path / "menu"
    folder.mkdir()
    (folder / "a.md").write_text("返品は十四日以内に受け付けます")
    build(folder, language="ja")
    with DocumentIndex.open("handbook") as index:
        assert index._by_words("十四日以内") == [1] and index._by_words("二十一日間") == []


def test_question_about_another_topic_is_below_the_threshold(folder: Path) -> None:
    build(folder)
    with DocumentIndex.open("handbook") as index:
        limit = calibrate(index, lambda questions: index.best_cosines(embed(questions)))
        foreign, own = index.best_cosines(embed(["zzz xxx qqq", "A night may cost 120 euros."]))
        assert foreign < limit < own
    with DocumentIndex.open("handbook") as index:
        assert index.threshold() == limit
    (folder / "leave.txt").write_text("Nobody has a holiday.")
    build(folder)
    with DocumentIndex.open("handbook") as index:
        assert index.threshold() is None


def test_broken_file_is_named(folder: Path) -> None:
    build(folder)
    (file,) = DocumentIndex.folder("handbook").glob("*.sqlite")
    file.write_bytes(b"no database" * 100)
    with pytest.raises(CorruptFile, match=r"\.sqlite"):
        search("holiday")
    DocumentIndex.remove("handbook")
    assert build(folder).added == 2


def test_refused_document_is_read_again(folder: Path) -> None:
    (folder / "late.md").write_bytes(b" ")
    assert [each.refused for each in build(folder).problems] == ["no text"]
    status = (folder / "late.md").stat()
    (folder / "late.md").write_bytes(b"x")
    os.utime(folder / "late.md", (status.st_atime, status.st_mtime))
    assert build(folder).problems == []


def test_spellings_of_a_word_are_equal(folder: Path) -> None:
    (folder / "menu.md").write_text(unicodedata.normalize("NFD", "Ph\u1edf h\u00f2a"))
    build(folder, language="vi")
    with DocumentIndex.open("handbook") as index:
        for form in ("NFC", "NFD"):
            assert index._by_words(unicodedata.normalize(form, "ph\u1edf"))
        assert index._by_words("ho\u00e0")  # the other place of the tone mark
    (folder / "menu.md").unlink()
    build(folder, language="vi")
    with DocumentIndex.open("handbook") as index:
        assert not index._by_words("h\u00f2a")


def test_index_of_the_first_form_is_converted(folder: Path) -> None:
    (folder / "menu.md").write_text("ph\u1edf h\u00f2a")
    build(folder, language="vi")
    with DocumentIndex.open("handbook") as index, open_file(index.file) as connection:
        with connection:
            connection.execute("UPDATE about SET value = '1' WHERE key = 'form'")
            connection.execute("INSERT INTO words (words) VALUES ('rebuild')")  # as written
        assert not index._by_words("ho\u00e0")
    for _ in range(2):
        with DocumentIndex.open("handbook") as index:
            assert index._by_words("ho\u00e0")
    (folder / "menu.md").unlink()
    build(folder, language="vi")
    with DocumentIndex.open("handbook") as index:
        assert not index._by_words("h\u00f2a")


def test_removed_index_is_unknown(folder: Path) -> None:
    build(folder)
    DocumentIndex.remove("handbook")
    assert DocumentIndex.names() == []
    for name in ("handbook", "../x"):
        with pytest.raises(RecipeError):
            DocumentIndex.remove(name)


def test_short_follow_up_is_searched_with_message_before() -> None:
    first = Message("user", "How many days of leave does everybody have?")
    turns = [Message("system", "Be brief."), first, Message("assistant", "30 [1]")]
    assert (
        search_text([*turns, Message("user", "And in winter?")])
        == f"{first.content} And in winter?"
    )
    for alone in ("Where may employees park their cars at night?", "", " "):
        assert search_text([*turns, Message("user", alone)]) == alone.strip()
    assert search_text([Message("user", "Leave?")]) == "Leave?"


def test_citations_name_passages_of_the_prompt() -> None:
    passages = tuple(FoundPassage("a.md", Passage(text, "", None), 0.9) for text in "ab")
    text = without_unknown_citations("Yes [2], no [3], see [1] and [2].", 2)
    assert text == "Yes [2], no , see [1] and [2]."
    assert DocumentAnswer("q", text, passages).cited == (2, 1)
    asked = [Message("user", "p?"), Message("assistant", "a [2]."), Message("user", "q?")]
    _, earlier, user = add_passages(asked, ["a", "b"])
    assert earlier.content == "a."  # another passage
    assert user.content == f"{INSTRUCTIONS}\n\n[1] a\n\n[2] b\n\nQuestion: q?"


@pytest.mark.parametrize(("limit", "count"), [(3, 3), (2, 2), (1, 1), (0, 0)])
def test_last_passages_are_dropped_until_the_prompt_fits(limit: int, count: int) -> None:
    def submit(turns: Sequence[Message]) -> str:
        if turns[-1].content.count("fact") > limit:
            raise RecipeError("too long")
        return turns[-1].content

    def run() -> tuple[str, int]:
        facts = ["fact 1", "fact 2", "fact 3"]
        return submit_passages(
            [Message("user", "q?")], facts, submit, lambda error: isinstance(error, RecipeError)
        )

    if not count:
        with pytest.raises(RecipeError):
            run()
        return
    prompt, kept = run()
    assert kept == prompt.count("fact") == count
