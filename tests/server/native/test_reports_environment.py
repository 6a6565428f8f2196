"""The environment of a report process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luthier.server.native import reports


def test_report_process_environment_has_no_secrets(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    text = "import json, os; print(json.dumps(dict(os.environ)))"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{text}'\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    secrets = ("LUTHIER_SERVER_KEY", "LUTHIER_BOOTSTRAP")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    answer = reports._run_command([], {}, (0,))
    assert answer["LUTHIER_HOME"] == str(luthier_home)
    assert not set(secrets) & set(answer)
