"""Comparison of tuned models with techniques without training: contenders, chance and verdict."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_endpoint import Endpoint
from PIL import Image
from typer.testing import CliRunner

import luthier
from luthier.chat_models.base import ChatModel, Done, Reply
from luthier.cli.app import app
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import LabelledText
from luthier.documents import passages
from luthier.errors import DataError, RecipeError
from luthier.evaluation.significance import RowScores, differences
from luthier.graders import Exact, Similarity
from luthier.library.models import StoredModel, find
from luthier.library.reports import reports_of
from luthier.types import Message
from luthier.workflows.compare import (
    HeadToHead,
    check_leakage,
    check_measures,
    comparison_page,
    unseen_labels,
)
from luthier.workflows.contenders import Contender, Contest, equal_pairs
from luthier.workflows.estimate.budget import Prices, TokenPrices
from luthier.workflows.evaluate import open_graders
from luthier.workflows.prompting import PromptVariant, Technique, questions_of

ANIMALS = ("fox", "dog", "cat", "cow", "hen", "pig")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contender(
    name: str, technique: Technique, right: int, rows: int = 200, **more: Any
) -> Contender:
    score = RowScores.of([1] * right + [0] * (rows - right))
    return Contender(name, technique, score, {"exact": score.value}, **{"seconds": 0.1, **more})


def head_to_head(*contenders: Contender, **more: Any) -> HeadToHead:
    ordered = sorted(contenders, key=lambda each: -each.score.value)
    return HeadToHead("exact", len(contenders[0].score), ordered, **more)


def test_rows_whose_label_has_no_training_row_are_counted() -> None:
    held, train = (
        [LabelledText("f", number, text=f"row {number}", label=label) for number, label in rows]
        for rows in ([(1, "a"), (2, "b"), (3, ("a", "b"))], [(1, "a")])
    )
    assert (unseen_labels(held, train), unseen_labels(train, held)) == (2, 0)


def test_a_difference_is_significant_after_holm_s_correction() -> None:
    reference = RowScores.of([1] * 100 + [0] * 100)
    far, near = RowScores.of([1] * 150 + [0] * 50), RowScores.of([1] * 106 + [0] * 94)
    found = differences(reference, {"far": far, "near": near})
    assert found["far"].significant and found["far"].value == pytest.approx(0.25)
    assert found["near"].p_value == pytest.approx(2 * (1 - 0.9928), abs=0.02)
    assert found["near"].significant
    # Among ten comparisons, an equal difference may occur by chance.
    many = {f"same {n}": reference for n in range(9)}
    assert not differences(reference, {"near": near, **many})["near"].significant
    assert differences(reference, {"same": reference})["same"].p_value == pytest.approx(1)


def test_equal_models_differ_in_five_percent_at_most() -> None:
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        hard_R = draw.random(200)  # hard rows are hard for every model
        scores = [RowScores.of(draw.normal(hard_R, 0.3) < 0.7) for _ in range(5)]
        found = differences(scores[0], {str(n): each for n, each in enumerate(scores[1:])})
        wrong += any(each.significant for each in found.values())
    assert wrong <= 22  # 15 are 5 %, and 22 are two standard errors more


def test_verdict_depends_on_significance_and_costs() -> None:
    base = contender("base", "zero-shot", 100, seconds=0.2)
    tuned = contender("tuned", "fine-tuning", 150, preparation_seconds=300.0)
    found = head_to_head(base, tuned)
    assert "75.0%" in found.verdict() and "3,000" in found.verdict()
    equal = contender("tuned", "fine-tuning", 100)
    for pair in ((base, equal), (equal, base)):  # the best first, where both are
        assert "(+0.0% " in head_to_head(*pair).verdict()
    undecided = head_to_head(base, contender("tuned", "fine-tuning", 101, seconds=0.2))
    assert (found.worth_it, undecided.worth_it) == (True, None)
    ahead = head_to_head(contender("nearest", "prompt engineering", 190), tuned)
    assert ahead.worth_it is ahead.plain()["worth_it"] is False
    near = contender("base", "zero-shot", 100, seconds=0.14)  # each is measured once
    assert " times " not in head_to_head(near, tuned).verdict()
    slow = head_to_head(contender("words", "simple baselines", 100, seconds=0.001), tuned).verdict()
    assert " 100 times " in slow
    assert head_to_head(tuned, contender("other", "fine-tuning", 10)).worth_it is None
    assert head_to_head(tuned).worth_it is None

    # 2.58 standard errors of 1.4 %, for one of five


def test_prices_and_the_page() -> None:
    prices = Prices(per_hour=3.6)
    found = head_to_head(
        contender("base <b>", "zero-shot", 100),
        contender("tuned", "fine-tuning", 150),
        prices=prices,
    )
    plain = found.plain()
    assert [each["cost_per_1000"] for each in plain["contenders"]] == pytest.approx([0.1, 0.1])
    assert plain["contenders"][1]["behind_best"]["significant"] is True
    assert "behind_best" not in plain["contenders"][0] and plain["currency"] == "EUR"
    html = comparison_page(found, "rows.jsonl")
    assert "base &lt;b&gt;" in html and "<b>" not in html and plain["verdict"].split(":")[0] in html
    assert "EUR/1,000" in html


def test_notes_explain_the_columns_alone() -> None:
    tuned = contender("tuned", "fine-tuning", 150)
    classified = head_to_head(contender("words", "simple baselines", 100), tuned)
    assert "tokens" not in classified.notes(page=False) and "cost" not in classified.notes(
        page=True
    )
    assert "preparation" in classified.notes(page=True).replace(classified.notes(page=False), "")
    share = RowScores.of([1, 0])
    written = head_to_head(
        contender("base", "zero-shot", 100, prompt_tokens=9.0),
        replace(
            tuned, consistency=share, paraphrase_consistency=share, scores={"exact": 1, "MB": 0}
        ),
        prices=Prices(per_hour=3.6),
    )
    assert written.notes(page=False).count(";") == classified.notes(page=False).count(";") + 4
    assert comparison_page(written, "rows.jsonl").count(f"{share.value:.1%} {share.error:.1%}") == 2


def test_monthly_costs_and_the_month_that_repays_the_training() -> None:
    tokens = TokenPrices(per_million_input=1, per_million_output=4)
    hosted: dict[str, Any] = {"endpoint": "big", "prompt_tokens": 100.0, "reply_tokens": 25.0}
    found = head_to_head(
        contender("tuned", "fine-tuning", 150, preparation_seconds=3600 * 400.0),
        contender("big at host", "zero-shot", 140, **hosted),
        contender("other at host", "zero-shot", 130, **hosted | {"endpoint": "other"}),
        contender("base", "zero-shot", 100),
        prices=Prices(per_hour=1, endpoints={"big": tokens}),
        per_month=5_000_000,
    )
    lines = {each["name"]: each for each in found.plain()["contenders"]}
    assert lines["big at host"]["cost_per_1000"] == pytest.approx(0.2)
    assert lines["big at host"]["cost_per_month"] == pytest.approx(1000)
    # 139 hours of work, on one machine that is rented for the whole month.
    assert lines["tuned"]["cost_per_month"] == pytest.approx(730)
    assert lines["big at host"]["break_even_month"] == 2
    assert lines["base"]["break_even_month"] is None
    assert "cost_per_month" not in lines["other at host"]
    assert "in month 2" in found.verdict()
    assert "EUR/month" in comparison_page(found, "rows.jsonl")


def test_trained_rows_are_remarked_or_refused() -> None:
    rows = [PromptCompletion("t", n, prompt=f"what is {n}", completion="x") for n in range(1, 21)]
    train = [PromptCompletion("s", 1, prompt="What is  7", completion="y")]
    assert len(check_leakage(rows, train)) == 1
    assert check_leakage(rows, []) == []
    with pytest.raises(DataError) as refused:
        check_leakage(rows, [*train, rows[1]])
    assert [problem.line for problem in refused.value.problems] == [2, 7]
    # As in the data gate, punctuation and system turns do not make a different question.
    asked = PromptCompletion("t", 1, prompt="What is 7?", completion="x")
    told = Conversation("s", 1, (Message("system", "Be brief."), Message("user", "what is 7"),
                                 Message("assistant", "y")))  # fmt: skip
    spoken = replace(told, messages=(Message("system", "Be long."), *told.messages[1:]))
    for one, other in (([asked], [replace(asked, prompt="what is, 7")]), ([told], [spoken])):
        with pytest.raises(DataError):
            check_leakage(one, other)
    labels = [LabelledText("t", 1, text="A fox", label="x")]
    with pytest.raises(DataError):
        check_leakage(labels, [LabelledText("s", 1, text="a fox", label="y")])


@pytest.mark.slow
def test_compare_decoder_with_prompts_and_documents(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Say {word} {n}", "completion": word} for n, word in enumerate(ANIMALS * 5)]
    data = write(tmp_path / "train.jsonl", rows)
    held = write(tmp_path / "held.jsonl", [
        {"prompt": f"Please say {word}", "completion": word} for word in ANIMALS
    ])  # fmt: skip
    notes = tmp_path / "notes.txt"
    notes.write_text("A fox is an animal. A hen is a bird.")
    tuned = luthier.tune(
        data, base=str(tiny_model_folder), name="x", training__max_steps=4, data__validation_share=0
    )
    found = luthier.compare(held, [tuned.model_id], documents=[notes], max_tokens=4)
    assert found.rows == 6 and found.measure == "exact"
    assert Counter(each.technique for each in found.contenders) == {
        "zero-shot": 1, "prompt engineering": 2, "RAG": 1, "simple baselines": 2, "fine-tuning": 1,
        "fine-tuning and RAG": 1, "fine-tuning and examples": 2,
    }  # fmt: skip
    (always,) = [each for each in found.contenders if each.name.startswith("always")]
    assert always.score.value == 1 / 6 and set(always.replies) <= {*ANIMALS}
    # The nearest training row has the right answer.
    best = found.best
    assert (best.technique, best.score.value) == ("simple baselines", 1.0)
    by_way = {each.technique: each for each in found.contenders}
    assert (by_way["RAG"].prompt_tokens or 0) > (by_way["zero-shot"].prompt_tokens or 0)
    assert by_way["fine-tuning"].preparation_seconds > 0 == by_way["RAG"].preparation_seconds
    # The same rows and graders as `evaluate`, so the same scores.
    for way, model in (("fine-tuning", tuned.model_id), ("zero-shot", str(tiny_model_folder))):
        alone = luthier.evaluate(model, held, max_tokens=4)
        assert by_way[way].score.value == alone.scores["exact"]
    # The training rows choose the grader, not the held-out rows.
    replies = [{**row, "completion": f"{row['completion']} is a word " * 4} for row in rows]
    wordy = write(tmp_path / "wordy.jsonl", replies)
    assert luthier.compare(held, [tuned.model_id], train=wordy, max_tokens=4).measure == "rouge_l"
    # Contenders longer than the context are left out.
    room = find(tuned.model_id).room
    monkeypatch.setattr(passages, "WORDS", room)
    notes.write_text("a fox " * room)
    long = luthier.compare(held, [tuned.model_id], documents=[notes], max_tokens=4)
    assert len(long.contenders) == 8


@pytest.mark.slow
def test_compare_command_with_classifier_and_baselines(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [
        {"text": f"the {word} is {'here' if n % 2 else 'not here, no'}", "label": f"side {n % 2}"}
        for n, word in enumerate(ANIMALS * 6)
    ]
    data = write(tmp_path / "train.jsonl", rows)
    held = write(
        tmp_path / "held.jsonl", [{**row, "text": f"now {row['text']}"} for row in rows[:12]]
    )
    tuned = luthier.tune(
        data, base=str(family_folder("bert")), name="x", training__max_steps=4,
        data__validation_share=0, training__refit=False,
    ).model_id  # fmt: skip
    asked = ["compare", held, "--tuned", tuned, "--html", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    # Repeated rows are measured once.
    assert found["measure"] == "accuracy" and found["rows"] == 6
    assert any(re.search(r"\b6\b", remark) for remark in found["remarks"])
    ways = [each["technique"] for each in found["contenders"]]
    assert ways.count("fine-tuning") == 1 and ways.count("simple baselines") >= 4
    scores = [each["score"] for each in found["contenders"]]
    assert scores == sorted(scores, reverse=True)
    text = CliRunner().invoke(app, [*asked, "--attach"])
    (kept,) = reports_of(find(tuned))
    assert kept.report.kind == "comparison" and [*kept.report.data] == [held]
    assert kept.report.result["rows"] == 6
    assert text.exit_code == 0 and found["verdict"].split(".")[0] in " ".join(text.stdout.split())
    # A model cannot be compared with itself.
    itself = CliRunner().invoke(app, ["compare", held, "--tuned", tuned, "--base", tuned])
    assert itself.exit_code == 2
    # Training rows are refused as test rows.
    leaked = CliRunner().invoke(app, ["compare", data, "--tuned", tuned])
    assert leaked.exit_code == 2 and "leakage.input" in leaked.output
    nothing = CliRunner().invoke(
        app, ["compare", held, "--tuned", tuned, "--train", str(tmp_path / "no")]
    )
    assert nothing.exit_code == 2, nothing.output
    # The second model learned the test rows, and the rows of the first have changed.
    other = luthier.tune(held, base="tfidf", name="leaked").model_id
    both = ["compare", held, "--tuned", tuned, "--tuned", other, "--json"]
    found = json.loads(CliRunner().invoke(app, both).stdout)
    assert any(other in remark for remark in found["remarks"])
    assert "logistic regression on words (TF-IDF)" not in {e["name"] for e in found["contenders"]}
    write(tmp_path / "train.jsonl", rows[::-1])
    changed = CliRunner().invoke(app, both)
    assert data in changed.stderr
    ways = {each["technique"] for each in json.loads(changed.stdout)["contenders"]}
    assert ways == {"fine-tuning"}


def test_compare_classifier_with_decoder_base(
    family_folder: Callable[[str], Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": f"the {word} number {n}", "label": "even" if n % 2 else "odd"}
        for n, word in enumerate(ANIMALS * 6)
    ]
    data = write(tmp_path / "train.jsonl", rows)
    held = write(
        tmp_path / "held.jsonl", [{**row, "text": f"now {row['text']}"} for row in rows[:8]]
    )
    tuned = luthier.tune(
        data, base=str(family_folder("bert")), name="x", training__max_steps=2,
        data__validation_share=0, training__refit=False,
    ).model_id  # fmt: skip
    found = luthier.compare(held, [tuned], base=str(tiny_model_folder), max_tokens=3)
    ways = Counter(each.technique for each in found.contenders)
    assert ways.pop("simple baselines") >= 4  # on words, and on states of the decoder
    assert ways == {"fine-tuning": 1, "zero-shot": 1, "prompt engineering": 2}
    assert found.measure == "accuracy" and {len(each.score) for each in found.contenders} == {8}


@pytest.mark.slow
def test_compare_tagger_with_linear_probe(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word has a state, and rows have different numbers of words."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        made = []
        for number in range(first, first + count):
            words = ["a", ANIMALS[number % 6], "jumps", *["over"] * (number % 3), f"row{number}"]
            tags = ["B-ANIMAL" if word in ANIMALS else "O" for word in words]
            made.append({"tokens": words, "tags": tags})
        return made

    # The training file has a mapped column, and the test file has the standard column.
    named = [{"words": row["tokens"], "tags": row["tags"]} for row in rows(0, 60)]
    train = write(tmp_path / "train.jsonl", named)
    test = write(tmp_path / "test.jsonl", rows(100, 20))
    base = str(family_folder("bert"))
    columns = {"tokens": "words"}
    luthier.tune(
        train, base=base, name="tags", **{"training.max_steps": 2, "data.columns": columns}
    )
    found = luthier.compare(test, tuned=["bert:tags"])
    names = [each.name for each in found.contenders]
    assert "logistic regression on the base model" in names
    assert "the most frequent tag of each word" in names
    # A base with a shorter context than the tuned model has no states for the last words.
    context = StoredModel.room.fget
    monkeypatch.setattr(
        StoredModel,
        "room",
        property(lambda stored: context(stored) if stored.id == "bert:tags" else 8),
    )
    found = luthier.compare(test, tuned=["bert:tags"])
    names = [each.name for each in found.contenders]
    assert len(names) == 2 and "the most frequent tag of each word" in names
    assert found.remarks


def test_unchanged_reader_of_lines_is_a_contender(
    family_folder: Callable[[str], Path], tmp_path: Path, luthier_home: Path
) -> None:
    random = np.random.default_rng(0)
    files = []
    for part in ("train", "test"):
        rows = []
        for number, text in enumerate(("no", "one", "ae", "ya")):
            name = f"{part}-{number}.png"
            pixels = random.integers(0, 256, (48, 64), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
            rows.append({"image": name, "caption": text})
        files.append(write(tmp_path / f"{part}.jsonl", rows))
    train, test = files
    base = str(family_folder("pp_ocr"))
    luthier.tune(train, base=base, name="lines", **{"training.max_steps": 1})
    found = luthier.compare(test, tuned=["pp_ocr:lines"])
    techniques = {each.name.rpartition("/")[2]: each.technique for each in found.contenders}
    assert techniques == {"pp_ocr:lines": "fine-tuning", "pp_ocr": "zero-shot"}
    assert found.measure == "cer"


def test_lead_has_the_length_that_fits_the_training_rows() -> None:
    words = [[f"w{row}{n}" for n in range(40)] for row in range(6)]
    rows = [
        PromptCompletion("t", n, " ".join(each), " ".join([*each[:12], "end"]))
        for n, each in enumerate(words, 1)
    ]
    questions, learned = questions_of(rows[:2]), questions_of(rows[2:])
    contest = Contest({"rouge_l": Similarity(measure="rouge_l")})
    (found,) = contest.lead(rows[:2], rows[2:], questions, learned)
    assert found.replies == [" ".join(each[:12]) for each in words[:2]]
    # Short prompts are no text to summarize, and other graders have no use for a lead.
    short = [PromptCompletion("t", 1, "a b c d", "a b c")]
    assert not contest.lead(short, short, questions_of(short), questions_of(short))
    assert not Contest({"exact": Exact()}).lead(rows[:2], rows[2:], questions, learned)


class HalfLost(ChatModel):
    """A model that loses every second reply."""

    name = "lossy"

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": "lossy"}

    def ask(self, questions: Any, sampling: Any, done: Done, note: Any) -> None:
        for index in range(0, len(questions), 2):
            done(index, Reply("yes", "stop"))


def test_lost_replies_are_no_equal_replies_to_paraphrases() -> None:
    rows = [PromptCompletion("t", n, f"Is it {n}?", "yes") for n in range(1, 7)]
    contest = Contest({"exact": Exact()}, groups=[[0, 2], [1, 3], [4, 5]])
    variant = PromptVariant("zero-shot", "zero-shot", [])
    (found,) = contest.ask(HalfLost(), rows, questions_of(rows), [variant], lambda texts: 1.0)
    assert found.score.value == 0.5 and contest.remarks
    share = found.paraphrase_consistency
    assert share is not None and share.parts_R.tolist() == [1]  # the first pair alone is whole


def test_different_measures_are_refused() -> None:
    check_measures({"a": "accuracy", "b": "accuracy"})
    with pytest.raises(RecipeError):
        check_measures({"a": "recall_at_1", "b": "accuracy"})


def test_a_grader_has_not_the_name_of_an_error() -> None:
    with pytest.raises(RecipeError):
        open_graders({"loss": Exact()}, 1, print)


def test_pairs_are_searched_with_both_sides(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"anchor": f"a {a} {n}", "positive": f"{n % 5} {n}"} for n, a in enumerate(ANIMALS * 4)]
    train = write(tmp_path / "train.jsonl", rows[:18])
    test = write(tmp_path / "test.jsonl", rows[18:])
    tuned = luthier.tune(
        train, base=str(family_folder("bert")), name="pairs", training__max_steps=2,
        data__validation_share=0,
    ).model_id  # fmt: skip
    found = luthier.compare(test, [tuned])
    (base,) = [each for each in found.contenders if each.name == "the base model as it is"]
    assert base.score.value < 1
    judged = write(tmp_path / "judged.jsonl", [{"text_a": "a", "text_b": "b", "label": 1}])
    with pytest.raises(RecipeError):
        luthier.compare(judged, [tuned])


def test_own_prompts_and_an_endpoint_and_shown_replies(
    tiny_model_folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    rows = [
        {"prompt": f"Say {word} {n}", "completion": word, "tone": f"tone {n}", "kind": n % 2}
        for n, word in enumerate(ANIMALS * 3)
    ]
    train = write(tmp_path / "train.jsonl", rows[:12])
    held = write(tmp_path / "held.jsonl", rows[12:])
    tuned = luthier.tune(
        train, base=str(tiny_model_folder), name="x", training__max_steps=2, data__validation_share=0
    ).model_id  # fmt: skip
    system, template = tmp_path / "brief.txt", tmp_path / "template.txt"
    system.write_text("Reply with one word.")
    template.write_text("{tone}: {prompt}")
    endpoint.answer = lambda prompt: prompt.split()[-2]
    rival = f"{endpoint.url}#big"
    found = luthier.compare(
        held, [tuned], prompt=[system, template], rival=[rival], max_tokens=3, show=2, seeds=3,
        paraphrases="kind",
    )  # fmt: skip
    techniques = Counter(each.technique for each in found.contenders)
    assert techniques["fine-tuning and instructions"] == techniques["fine-tuning and examples"] == 2
    assert techniques["zero-shot"] == 2 and techniques["prompt engineering"] == 6
    big = [each for each in found.contenders if each.name.startswith("big")]
    assert all(each.endpoint == "big" and each.prompt_tokens and each.reply_tokens for each in big)
    assert len(big) == 3 and all(each.score.value == 1 and not each.is_tuned for each in big)
    bodies = [[turn["content"] for turn in body["messages"]] for body in endpoint.bodies]
    assert ["Say fox 12"] in bodies and ["tone 12: Say fox 12"] in bodies
    assert ["Reply with one word.", "Say fox 12"] in bodies
    sampled = {each.name: each.consistency for each in found.contenders if each.consistency}
    assert len(sampled) == 2 and tuned in sampled
    assert all({*np.round(3 * each.parts_R)} <= {0.0, 1.0, 3.0} for each in sampled.values())
    alike = {
        each.name: share for each in found.contenders if (share := each.paraphrase_consistency)
    }
    assert {tuned, *(each.name for each in big)} <= alike.keys()
    assert all(alike[each.name].value == 0 for each in big)
    assert equal_pairs([["a", "a ", "b"], ["c", "c"]]).parts_R.tolist() == [1 / 3, 1]
    requests = len(endpoint.bodies)
    with pytest.raises(RecipeError):
        luthier.compare(held, [tuned], rival=[rival], max_tokens=3, paraphrases="prompt")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    with_tools = write(tmp_path / "tools.jsonl", [{**row, "tools": tools} for row in rows[12:]])
    with pytest.raises(RecipeError):
        luthier.compare(with_tools, [tuned], rival=[rival], max_tokens=3)
    assert len(endpoint.bodies) == requests  # wrong rows and columns are found before requests
    first, second = found.shown
    assert (first.prompt, first.expected) == ("Say fox 12", "fox")
    assert [name for name in first.replies if name.startswith("big")] and tuned in second.replies
    assert found.plain()["shown"][0]["expected"] == "fox"
    for text in ("Say {wrong}", "Is it {completion}?"):
        template.write_text(text)
        with pytest.raises(RecipeError):
            luthier.compare(held, [tuned], prompt=[template], max_tokens=3)
    with pytest.raises(RecipeError):
        luthier.compare(held, [tuned], rival=["big"], max_tokens=3)
