"""The Python API for programs: rows in memory, progress and types."""

from __future__ import annotations

import inspect
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

import luthier
from luthier.cli.terminal.progress import NotebookReporter
from luthier.data import in_memory
from luthier.data.in_memory import store_rows
from luthier.engine.metrics import Reporter
from luthier.errors import RecipeError

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "river",
    "stone",
    "cloud",
    "apple",
    "train",
    "music",
    "winter",
    "paper",
    "garden",
    "bottle",
]
ROWS = [
    {"text": f"{WORDS[n % 10]} {WORDS[(3 * n + n // 10) % 10]} {colour} {n * n}", "label": colour}
    for n in range(20)
    for colour in "ab"
]


class PandasFrame:
    """The methods of a pandas frame that conversion uses."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows, self.columns, self.iloc = rows, list(rows[0]), None

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[Mapping[str, Any]]:
        assert orient == "records"
        return [*self.rows]


class PolarsFrame:
    """The methods of a polars frame that conversion uses."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows, self.columns = rows, list(rows[0])

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("polars yields columns")

    def iter_rows(self, named: bool) -> Iterator[Mapping[str, Any]]:
        assert named
        return iter(self.rows)


class LabelledSet(list[dict[str, Any]]):
    """A ``datasets.Dataset`` with class numbers."""

    def __init__(self) -> None:
        super().__init__({**row, "label": "ab".index(row["label"])} for row in ROWS)
        kind = SimpleNamespace(names=["a", "b"], int2str=None)
        self.features = {"text": None, "label": kind}


@pytest.mark.parametrize(
    "convert",
    [
        list,
        iter,
        PandasFrame,
        PolarsFrame,
        lambda rows: LabelledSet(),
        lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
        lambda rows: {key: np.array([row[key] for row in rows]) for key in rows[0]},
    ],
    ids=[
        "list",
        "iterator",
        "pandas-methods",
        "polars-methods",
        "dataset-methods",
        "dict-of-lists",
        "dict-of-arrays",
    ],
)
def test_rows_in_memory_are_one_file(convert: Callable[[Any], Any], luthier_home: Path) -> None:
    assert in_memory.is_rows(convert(ROWS)) and not in_memory.is_splits(convert(ROWS))
    path, again = store_rows(convert(ROWS)), store_rows(ROWS)
    assert path == again and path.parent == luthier_home / "rows"
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert len([*path.parent.iterdir()]) == 1


@pytest.mark.parametrize(
    ("library", "convert"),
    [
        ("pandas", lambda library: library.DataFrame(ROWS)),
        ("polars", lambda library: library.DataFrame(ROWS)),
        ("polars", lambda library: library.LazyFrame(ROWS)),
        ("datasets", lambda library: library.Dataset.from_list(ROWS)),
        ("pyarrow", lambda library: library.Table.from_pylist(ROWS)),
    ],
)
def test_frames_of_libraries(library: str, convert: Callable[[Any], Any]) -> None:
    frame = convert(pytest.importorskip(library))
    assert in_memory.is_rows(frame)
    assert store_rows(frame) == store_rows(ROWS)


def test_numbers_arrays_and_missing_values() -> None:
    class NAType:
        pass

    row = {
        "text": "a", "label": np.int64(3), "weight": np.float32(0.5), "vector": np.arange(3),
        "nothing": np.nan, "missing": NAType(), "none": None, "day": date(2026, 11, 29),
        "inner": [{"share": float("nan")}], "unknown": np.datetime64("NaT", "s"),
    }  # fmt: skip
    stored = json.loads(store_rows([row]).read_text())
    assert stored == {
        "text": "a", "label": 3, "weight": 0.5, "vector": [0, 1, 2], "day": "2026-11-29",
        "inner": [{"share": None}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": "a"}, 5], r"rows\[1\].*int"),
        ([("a", "b")], r"rows\[0\].*tuple.* frame"),
        ([["a", "b"]], r"rows\[0\].*list"),
        (["a", "b"], "`data` is a list.* frame"),
        ({"text": "a"}, "`data` is a dict"),
        ({"text": ["a", "b"], "label": ["x"]}, '"text" has 2, "label" has 1'),
        ([{"text": b"a"}], r'rows\[0\].*text.*bytes'),
        (({"text": str(n)} for n in count()), "itertools.islice"),
    ],
    ids=[
        "none", "no-dictionary", "tuples", "lists", "texts", "text", "lengths", "bytes", "endless"
    ],
)  # fmt: skip
def test_rows_that_cannot_be_stored(
    rows: Any, message: str, monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    monkeypatch.setattr(in_memory, "MOST_ROWS", 50)
    with pytest.raises(luthier.RefusedInput, match=message):
        luthier.inspect(rows)
    assert not [*(luthier_home / "rows").glob("*")]


def test_relative_paths_of_images_are_stored_as_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    stored = json.loads(store_rows([{"image": "a.png", "label": "b.png"}]).read_text())
    assert stored == {"image": str(tmp_path / "a.png"), "label": "b.png"}
    assert json.loads(store_rows(["a.png"]).read_text()) == {"image": str(tmp_path / "a.png")}


def test_rows_in_memory_name_images_in_any_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": str(tmp_path / "a.png"), "label": "a"}
    assert "media.outside" not in luthier.inspect([row], base=None).findings.examples
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "r.jsonl").write_text(json.dumps(row))
    report = luthier.inspect(tmp_path / "rows" / "r.jsonl", base=None)
    assert "media.outside" in report.findings.examples


def test_findings_name_the_index_of_the_row(family_folder: Callable[[str], Path]) -> None:
    rows = [*ROWS, {"label": "a"}, {"text": "fox", "label": "a"}, {"label": "b"}]
    with pytest.raises(luthier.DataError, match=r"rows\[40\]: .*also row 42"):
        luthier.tune(rows, base=str(family_folder("bert")), name="x")
    report = luthier.inspect(rows, base=None)
    assert report.exit_code == 2
    places = [str(each.place) for found in report.findings.examples.values() for each in found]
    assert "rows[40]" in places
    held = [*ROWS, {"text": "fox"}]
    places = [
        str(each.place)
        for found in luthier.inspect(ROWS, validation=held, base=None).findings.examples.values()
        for each in found
    ]
    assert "validation[40]" in places and "rows[40]" not in places


def test_advice_names_columns_as_keywords(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": row["text"], "intent": row["label"]} for row in ROWS]
    with pytest.raises(luthier.DataError, match=r"rows: .*`columns=\{\"label\": \"intent\"\}`"):
        luthier.tune(rows, base=str(tiny_model_folder), name="x")
    report = luthier.inspect(rows, base=None, columns={"label": "intent"})
    assert report.exit_code == 0 and report.summaries["balance"]["labels"] == 2


def test_data_set_with_splits(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Training uses the training and validation rows, and evaluation uses the test rows."""
    splits = {"train": ROWS[:20], "validation": ROWS[20:30], "test": ROWS[30:]}
    report = luthier.inspect(splits, base=None)
    assert report.rows == {"train": 20, "validation": 10, "test": 10}
    assert luthier.inspect({"train": ROWS[:20], "testing": ROWS[30:]}, base=None).rows == {
        "train": 20, "test": 10
    }  # fmt: skip
    with pytest.raises(RecipeError):
        luthier.inspect({"train": ROWS[:20], "unsupervised": ROWS[20:]}, base=None)
    base = str(family_folder("bert"))
    tuned = luthier.tune(splits, base=base, name="two", training__max_steps=2)
    assert tuned.rows == 20
    resumed = luthier.tune(splits, base=base, name="two", training__max_steps=2, resume=True)
    assert resumed == tuned
    assert len(luthier.evaluate(tuned.model_id, splits).rows) == 10
    (remark,) = luthier.evaluate(tuned.model_id, splits["train"]).remarks[:1]
    assert "was trained on these rows" in remark
    texts = np.array([row["text"] for row in ROWS[:3]])
    answers = luthier.predict(tuned.model_id, texts).plain()["answers"]
    assert [answer["text"] for answer in answers] == [*texts]
    made = luthier.split({"train": ROWS}, str(tmp_path / "parts"))
    assert {*made["splits"]} == {"train", "validation", "test"}
    target = tmp_path / "clean.jsonl"
    assert luthier.clean(ROWS, str(target), dedupe="exact").rows_in == 40


def check_display(result: Any) -> str:
    """Check the forms of a result, and return the HTML."""
    assert 1 <= len(repr(result).splitlines()) <= 5
    json.dumps(result.to_dict())
    html: str = result._repr_html_()
    assert html.count("<style>") == 1 and html.lstrip().startswith('<div class="luthier">')
    assert "<script" not in html and "<html" not in html and ":root" not in html
    return html


def test_results_print_short_and_render_as_html(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(family_folder("bert"))
    report = luthier.inspect([*ROWS, {"text": "<b>no label</b>"}], base=None)
    assert "row.keys" in repr(report) or "rows[40]" in repr(report)
    assert "rows[40]" in check_display(report)
    assert report.to_rows()[0]["index"] == 40
    tuned = luthier.tune(ROWS[:30], base=base, name="shown", training__max_steps=2)
    assert repr(tuned).startswith(f"{tuned.model_id} is stored")
    assert check_display(tuned).count("data:image/svg+xml") == 4  # loss and rates
    evaluation = luthier.evaluate(tuned.model_id, ROWS[30:])
    assert "Confusion matrix" in check_display(evaluation)
    assert len(evaluation.to_rows()) == 10
    compared = luthier.compare(ROWS[30:], [tuned.model_id])
    assert compared.verdict().replace("'", "&#39;") in check_display(compared)
    assert compared.to_rows()[0]["name"] == compared.best.name
    predictions = luthier.predict(tuned.model_id, [row["text"] for row in ROWS[:2]])
    assert "<table" in check_display(predictions) and ROWS[0]["text"] in repr(predictions)
    assert {*predictions.to_rows()[0]} == {"text", "predicted"}
    check_display(luthier.estimate(ROWS, base=base))
    assert "parents" in check_display(luthier.certificate(tuned.model_id))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(luthier.RefusedInput, match="pip install pandas"):
        predictions.to_pandas()


class Screen(io.StringIO):
    """Output of a notebook, or of a terminal."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        """Return whether the output is a terminal."""
        return self.terminal


def test_progress_only_where_a_person_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def output(terminal: bool, notebook: bool, reporter: Reporter | None = None) -> str:
        out, err = Screen(terminal), Screen(terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        shell = SimpleNamespace(get_ipython=lambda: object() if notebook else None)
        monkeypatch.setitem(sys.modules, "IPython", shell)
        luthier.inspect(ROWS, base=None, reporter=reporter)
        return out.getvalue() + err.getvalue()

    assert not output(terminal=False, notebook=False)
    assert "\x1b[2K" in output(terminal=True, notebook=False)
    assert "\rinspect, 40 rows" in output(terminal=False, notebook=True)
    assert not output(terminal=True, notebook=False, reporter=Reporter())


def test_notebook_shows_one_live_line_with_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count(step=10.0)
    monkeypatch.setattr("luthier.cli.terminal.progress.time.monotonic", lambda: next(clock))
    reporter = NotebookReporter()
    reporter.stage("Reading rows")
    reporter.settings([("epochs", 3, "few rows"), ("rate", 0.001, "usual")])
    for step in (1, 2, 3):
        line = {"event": "train", "step": step, "loss": 0.5, "tokens_per_second": 9.0,
                "memory_bytes": 1e9}  # fmt: skip
        reporter.metrics(line, 4)
    reporter.note("Use `training.epochs=3`")
    reporter.close()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].endswith("\rChosen: epochs=3, rate=0.001")
    assert "step 3 of 4, 10 s left: loss 0.500" in lines[1]
    assert lines[1].rstrip().endswith("  Use `training.epochs=3`")
    assert not lines[-1].rpartition("\r")[2].strip()


def test_signatures_have_no_parts_of_the_command_line() -> None:
    for name in luthier.__all__:
        function = getattr(luthier, name)
        if inspect.isfunction(function):
            assert not re.search(r"Annotated|FromText|typer", str(inspect.signature(function)))
            assert pickle.loads(pickle.dumps(function)) is function
    parameters = inspect.signature(luthier.tune).parameters
    assert parameters["epochs"].annotation == float | None
    assert "Rows" in parameters["validation"].annotation


@pytest.mark.slow
def test_documented_programs_pass_strict_type_checks(tmp_path: Path) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        if re.search(r"\bluthier\.\w+\(", block)
    ]
    files = []
    for number, block in enumerate(blocks):
        files.append(tmp_path / f"block_{number}.py")
        files[-1].write_text(block if "import luthier" in block else f"import luthier\n{block}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--ignore-missing-imports",
         *files],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_models_are_listed_and_removed(luthier_home: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for word in ("door", "bell") for n in range(8)]
    first = luthier.tune(rows, base="tfidf", name="cell")
    with pytest.raises(luthier.RunConflict, match="remove"):
        luthier.tune(rows[1:], base="tfidf", name="cell")
    assert luthier.tune(rows, base="tfidf", name="cell", resume=True).rows == first.rows
    assert "tfidf:cell" in repr(luthier.load("tfidf:cell"))
    assert [model["id"] for model in luthier.list_models()["custom"]] == ["tfidf:cell"]
    assert luthier.remove_model("tfidf:cell")["removed"]
    assert luthier.list_models()["custom"] == []
    with pytest.raises(luthier.UnknownModel):
        luthier.remove_model("tfidf:cell")


def test_predictions_in_a_file_are_rows(luthier_home: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for word in ("door", "bell") for n in range(8)]
    luthier.tune(rows, base="tfidf", name="cell")
    found = luthier.predict("tfidf:cell", ["a door", "a bell"], output=tmp_path / "out.jsonl.gz")
    assert [row["predicted"]["label"] for row in found.to_rows()] == ["door", "bell"]
    unsure = luthier.predict("tfidf:cell", ["a door", "a bell", "one"], least_certain=1)
    assert [row["text"] for row in unsure.to_rows()] == ["one"]
    for wrong in ({"least_certain": 0}, {"top": 0}, {"least_certain": 1, "explain": True}):
        with pytest.raises(luthier.RecipeError, match=next(iter(wrong))):
            luthier.predict("tfidf:cell", ["a door"], **wrong)


def test_one_text_for_a_sequence(luthier_home: Path) -> None:
    rows = [{"text": "a", "label": "b"}]
    with pytest.raises(luthier.UnknownModel, match="tfidf:none"):
        luthier.compare(rows, tuned="tfidf:none")
    with pytest.raises(luthier.RecipeError, match="learning_rate`"):
        luthier.study(rows, vary="learning_rate=1e-4")


def test_measured_steps_as_rows(family_folder: Callable[[str], Path], luthier_home: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for word in ("door", "bell") for n in range(8)]
    found = luthier.tune(
        rows, base=str(family_folder("bert")), name="x", training__max_steps=2,
        data__validation_share=0.25,
    )  # fmt: skip
    events = [(row["event"], row["step"]) for row in found.to_rows()]
    assert ("train", 2) in events and ("validation", 2) in events
    assert set(found.to_pandas().event) >= {"train", "validation"}


def test_an_export_has_the_thresholds_of_labels(luthier_home: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {number}", "label": label}
        for label, word in (("ham", "meeting"), ("spam", "winner"))
        for number in range(40)
    ]
    luthier.tune(rows, base="tfidf", name="mail", objective={"thresholds": {"spam": 0.7}})
    luthier.export("tfidf:mail", tmp_path / "out", merged=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["thresholds"] == {"spam": 0.7}


def test_pictures_are_paths_bytes_or_images(luthier_home: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            colour = tuple(max(0, each - 8 * number) for each in ImageColor.getrgb(name))
            Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / name / f"{number}.png")
    luthier.tune(tmp_path / "photos", base="colour-statistics", name="photos")
    model, file = luthier.load("colour-statistics:photos"), tmp_path / "photos/red/1.png"
    forms = [str(file), file, file.read_bytes(), Image.open(file)]
    assert [model.predict(form)["label"] for form in forms] == ["red"] * 4
    assert [each["label"] for each in model.predict(forms)] == ["red"] * 4
    (remark, *_) = luthier.evaluate("colour-statistics:photos", tmp_path / "photos").remarks
    assert "was trained on these rows" in remark
    (tmp_path / "a.heic").touch()
    with pytest.raises(luthier.DataError, match=r"Convert \.heic"):
        luthier.predict("colour-statistics:photos", str(tmp_path / "a.heic"))
