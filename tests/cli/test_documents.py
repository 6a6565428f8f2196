"""``luthier index`` and ``luthier ask``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli.documents import (
    ask,
    index_documents,
    remove_index,
    search_documents,
    show_index,
)
from luthier.documents.index import DocumentIndex
from luthier.errors import RefusedInput

pytestmark = pytest.mark.usefixtures("luthier_home")


@pytest.fixture
def indexed(tmp_path: Path, family_folder: Callable[[str], Path]) -> str:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "leave.md").write_text("# Leave\n\nEverybody has thirty days of leave.")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7")
    pytest.importorskip("pypdfium2", reason="needs the extra documents")
    summary = index_documents([folder], name="handbook", model=str(family_folder("bert")))
    assert summary.update is not None
    assert (summary.update.added, summary.passages) == (2, 1)
    assert [each.path for each in summary.update.problems] == [str(folder / "broken.pdf")]
    return "handbook"


def test_answer_comes_from_the_passages(indexed: str, tiny_model_folder: Path) -> None:
    with DocumentIndex.open(indexed) as index:
        index.threshold = -1.0
    answer = ask(str(tiny_model_folder), "How many days?", index=indexed, max_tokens=4)
    assert not answer.declined
    assert [each.passage.text for each in answer.passages] == [
        "Everybody has thirty days of leave."
    ]
    assert set(answer.cited) <= {1}


def test_foreign_question_is_declined_without_a_model(
    indexed: str, tiny_model_folder: Path
) -> None:
    with DocumentIndex.open(indexed) as index:
        index.threshold = 1.1
    answer = ask(str(tiny_model_folder), "How many days?", index=indexed)
    assert answer.declined and not answer.cited and answer.passages


def test_reading_model_answers_with_a_span(
    indexed: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.cli import documents

    class Reader:
        def answers(self, rows: list[object]) -> list[dict[str, object]]:
            return [{"answer": "thirty days", "score": 0.9} for _ in rows]

    with DocumentIndex.open(indexed) as index:
        passages = tuple(index.search("How many?", documents._embedder(index)(["How many?"])[0], 1))
    answer = documents._read_answer(Reader(), "How many?", passages)
    assert answer.text == "thirty days [1]" and answer.cited == (1,)


def test_index_is_listed_searched_and_removed(indexed: str) -> None:
    assert [each.name for each in show_index()] == [indexed]  # type: ignore[union-attr]
    assert search_documents(indexed, "leave", top=1).passages[0].passage.heading == "Leave"
    remove_index(indexed)
    assert show_index() == []


def test_mistakes_are_refused(indexed: str, family_folder: Callable[[str], Path]) -> None:
    for mistake in (
        lambda: search_documents("other", "leave"),
        lambda: search_documents(indexed, " "),
        lambda: ask(str(family_folder("bert")), "How many?", index=indexed),
        lambda: index_documents([Path("/none")], name="handbook"),
    ):
        with pytest.raises(RefusedInput):
            mistake()
