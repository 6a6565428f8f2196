"""``luthier index`` and ``luthier ask``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import documents
from luthier.cli.compare import compare
from luthier.cli.data import convert
from luthier.cli.documents import (
    ask,
    index_documents,
    remove_index,
    search_documents,
    show_index,
    show_summary,
)
from luthier.cli.inference.generate import chat
from luthier.data.conversations.citations import DECLINED
from luthier.documents.index import DocumentIndex
from luthier.documents.retriever import PassageReranker
from luthier.engine.metrics import Reporter
from luthier.errors import RefusedInput
from luthier.library.models import find

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
    assert (summary.update.added, summary.passages, summary.read) == (1, 1, 1)
    assert [each.path for each in summary.update.problems] == [str(folder / "broken.pdf")]
    return "handbook"


def test_answer_comes_from_the_passages(indexed: str, tiny_model_folder: Path) -> None:
    with DocumentIndex.open(indexed) as index:
        index.keep_threshold(-1.0)
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
        index.keep_threshold(1.1)
    answer = ask(str(tiny_model_folder), "How many days?", index=indexed)
    assert answer.declined and not answer.cited and answer.passages


def test_compare_declines_the_questions_that_ask_declines(
    indexed: str, tiny_model_folder: Path, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many days?", "completion": "Thirty"}\n')
    tuned, base = str(tiny_model_folder), str(family_folder("gpt2"))
    replies = []
    for threshold in (2.0, -1.0):
        with DocumentIndex.open(indexed) as index:
            index.keep_threshold(threshold)
        found = compare(rows, [tuned], base=base, index=indexed, max_tokens=4)
        (contender,) = [
            each for each in found.contenders if each.technique == "fine-tuning and RAG"
        ]
        replies.append(contender.replies[0])
    assert replies[0] == DECLINED != replies[1]


def test_reading_model_answers_with_a_span(
    indexed: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def answers(self, rows: list[object]) -> list[dict[str, object]]:
            return [{"answer": "thirty days", "score": 0.9} for _ in rows]

    with DocumentIndex.open(indexed) as index:
        query_H = documents.load_once(find(index.model)).embed(["How many?"])[0]
        passages = tuple(index.search("How many?", query_H, 1))
    answer = documents._read_answer(Reader(), "How many?", passages)
    assert answer.text == "thirty days [1]" and answer.cited == (1,)


def test_reranker_orders_passages_and_declines(
    indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reranker counts common words; its limit is stored next to that of the cosines."""
    (tmp_path / "handbook" / "parking.md").write_text("Parking is free for all employees.")
    with DocumentIndex.open(indexed) as index:
        model = index.model
    index_documents([tmp_path / "handbook"], name=indexed)

    def rank(question: str, texts: Sequence[str]) -> list[float]:
        asked = set(question.lower().split())
        return [float(len(asked & set(text.lower().split()))) for text in texts]

    monkeypatch.setattr(
        "luthier.documents.retriever.PassageReranker", lambda *_: PassageReranker("words", rank)
    )
    monkeypatch.setattr(documents, "check_ranks", lambda stored: stored)
    with DocumentIndex.open(indexed) as index:
        cosine = index.threshold()
    for question, declined in (("parking is free", False), ("how are whales born", True)):
        found = search_documents(indexed, question, reranker=model)
        assert found.declined == declined
    assert found.passages[0].relevance is not None
    best = search_documents(indexed, "is parking free", reranker=model).passages[0]
    assert best.passage.text.startswith("Parking")
    with DocumentIndex.open(indexed) as index:
        assert index.threshold() == cosine
        assert index.threshold("words") is not None
        index.keep_threshold(2.0)
    assert search_documents(indexed, "parking is free").declined
    assert not search_documents(indexed, "parking is free", reranker=model).declined


def test_models_stay_in_memory(indexed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search_documents(indexed, "leave")
    monkeypatch.setattr("luthier.cli.model.Model", None)  # would fail if called
    assert search_documents(indexed, "leave").passages


def test_chat_answers_from_the_index(
    indexed: str,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with DocumentIndex.open(indexed) as index:
        index.keep_threshold(-1.0)
    asked = iter(["How many days?", "And hours?"])

    def read(_: str) -> str:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    prompts: list[Any] = []

    def stream(self: Any, prompt: Any, *_: Any) -> Any:
        prompts.append(prompt)
        yield from ("Thirty [", "1] or [", "7", "].")
        return True

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("luthier.inference.generation.Generator.stream", stream)
    chat(str(tiny_model_folder), index=indexed)
    shown = capsys.readouterr().out
    assert "Thirty [1] or ." in shown
    assert "[1] leave.md, Leave: Everybody has thirty days of leave." in shown
    last = "".join(turn.content for turn in prompts[-1])
    assert "And hours?" in last and last.count("thirty days") == 1


def test_links_out_of_the_folder_are_left_out(indexed: str, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("A secret.")
    (tmp_path / "other").mkdir()
    folder = tmp_path / "handbook"
    (folder / "secret.md").symlink_to(tmp_path / "secret.md")
    (folder / "other").symlink_to(tmp_path / "other")
    (folder / "same.md").symlink_to(folder / "leave.md")
    update = index_documents([folder], name=indexed).update
    assert update is not None and update.added == 0
    left_out = [each.path for each in update.problems if "link" in each.refused]
    assert left_out == [str(folder / "other"), str(folder / "secret.md")]
    linked = index_documents([folder / "secret.md"], name=indexed).update
    assert linked is not None and linked.added == 1  # named by the user


def test_unfinished_index_is_shown(
    tmp_path: Path, family_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = find(str(family_folder("bert")))
    with pytest.raises(KeyboardInterrupt), DocumentIndex.update("half", model, "en"):
        raise KeyboardInterrupt
    shown = show_index("half")
    assert not isinstance(shown, list) and shown.unfinished == [(model.id, 0)]
    show_summary(show_index())
    assert "unfinished: half" in capsys.readouterr().out
    with pytest.raises(RefusedInput, match="unfinished"):
        search_documents("half", "leave")
    remove_index("half")
    assert show_index() == []


def test_documents_of_a_deleted_folder_are_removed(indexed: str) -> None:
    shown = show_index(indexed)
    assert not isinstance(shown, list)
    document = Path(shown.documents[0].path)
    with pytest.raises(RefusedInput):
        remove_index(indexed, document.parent / "other")
    document.unlink()
    remove_index(indexed, document)
    left = show_index(indexed)
    assert not isinstance(left, list)
    assert [each.path for each in left.documents] == [e.path for e in shown.documents[1:]]


def test_index_is_listed_searched_and_removed(indexed: str) -> None:
    assert [each.name for each in show_index()] == [indexed]  # type: ignore[union-attr]
    assert search_documents(indexed, "leave", top=1).passages[0].passage.heading == "Leave"
    remove_index(indexed)
    assert show_index() == []


def test_mistakes_are_refused(indexed: str, family_folder: Callable[[str], Path]) -> None:
    for mistake in (
        lambda: search_documents("other", "leave"),
        lambda: search_documents(indexed, " "),
        lambda: search_documents(indexed, "leave", top=0),
        lambda: index_documents([], name="empty"),
        lambda: ask(str(family_folder("bert")), "How many?", index=indexed),
        lambda: index_documents([Path("/none")], name="handbook"),
    ):
        with pytest.raises(RefusedInput):
            mistake()


def test_questions_become_rows_with_passages(indexed: str, tmp_path: Path) -> None:
    (tmp_path / "handbook" / "parking.md").write_text("Parking is free.")
    index_documents([tmp_path / "handbook"], name=indexed)
    questions = [
        {"question": "How many days of leave?", "answer": "thirty days"},
        {"question": "Who is the king?", "answer": "Nobody knows"},
    ]
    source, target = tmp_path / "questions.jsonl", tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, questions)))
    assert convert(source, target, index=indexed).rows == 1
    (row,) = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(row["passages"]) == [
        "Leave\nEverybody has thirty days of leave.",
        "Parking is free.",
    ]
    assert "thirty days" in row["passages"][row["cited"][0] - 1]


def test_watched_folder_is_indexed_after_each_change(
    indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "handbook", iter(range(9))

    def sleep(_: float) -> None:
        match next(steps):
            case 1:
                (folder / "parking.md").write_text("Parking is free.")
            case 3:
                (folder / "leave.md").unlink()
            case 5:
                raise KeyboardInterrupt

    monkeypatch.setattr("luthier.cli.documents.time.sleep", sleep)
    notes: list[str] = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "note", notes.append)
    summary = index_documents([folder], name=indexed, watch=True, reporter=reporter)
    counts = [note.split(", ")[0::2] for note in notes if "added" in note]
    assert counts == [
        ["0 documents added", "0 removed"],
        ["1 documents added", "0 removed"],
        ["0 documents added", "1 removed"],
    ]
    assert sum("broken.pdf: left out" in note for note in notes) == 1
    assert [Path(each.path).name for each in summary.documents] == ["broken.pdf", "parking.md"]
