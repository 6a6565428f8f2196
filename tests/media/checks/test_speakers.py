"""Tables of audio files with a column of speakers."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import pytest

from luthier.data.rows import RowReader
from luthier.gate.inspect import InspectionRequest, inspect

RULE = "column.speaker"


def table(folder: Path, column: str, file: str = "audio") -> Path:
    lines = [f"{file},label,{column}"]
    for number in range(4):
        with wave.open(str(folder / f"{number}.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes([number, number + 1]) * 800)
        lines.append(f"{number}.wav,{'ab'[number % 2]},s{number // 2}")
    path = folder / "rows.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("column", ["speaker", "Speaker_ID", "client_id", "room"])
def test_speaker_column_gives_warning_with_setting(column: str, tmp_path: Path) -> None:
    report = inspect(InspectionRequest(table(tmp_path, column), base=None))
    found = report.findings.examples.get(RULE, [])
    assert [each.place.file for each in found] == [str(tmp_path / "rows.csv")] * (column != "room")
    for each in found:
        assert f"`data.group_column={column}`" in each.closest_fix
        assert report.findings.severity(each.rule) == "warning"


def test_named_group_column_gives_no_warning(tmp_path: Path) -> None:
    def rules(**fields: Any) -> set[str]:
        reader = RowReader(table(tmp_path, "speaker"), **fields)
        assert len(reader.read_all()) == 4
        return {each.rule for each in reader.warnings}

    assert rules() == {RULE, "column.ignored"}
    assert rules(group_column="speaker") == set()


def test_rows_of_text_have_no_speakers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label,speaker\na,x,s\nb,y,s\n")
    reader = RowReader(path)
    assert len(reader.read_all()) == 2
    assert [each.rule for each in reader.warnings] == ["column.ignored"]
