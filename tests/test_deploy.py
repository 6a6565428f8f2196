"""The files in ``deploy/``: what they start exists, and takes the options that it is given."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from luthier.cli.app import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def entry_point() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (\[.*\])$", text, flags=re.MULTILINE)
    assert found is not None
    command: list[str] = json.loads(found[1])
    return command


def unit() -> list[str]:
    text = (DEPLOY / "luthier.service").read_text()
    found = re.search(r"^ExecStart=(.*)$", text, flags=re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize("command", [entry_point(), unit()], ids=["Dockerfile", "systemd"])
def test_the_command_takes_its_options(command: list[str]) -> None:
    assert Path(command[0]).name == "luthier" and command[1] == "serve"
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for param in serve.params for option in param.opts}
    assert {each for each in command[2:] if each.startswith("--")} <= known


def test_the_image_installs_extras_that_there_are() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    found = re.search(r"'\.\[([\w,]+)\]'", text)
    assert found is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(found[1].split(",")) <= project["optional-dependencies"].keys()


def test_the_parts_of_the_compose_file_name_each_other_rightly() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    services = re.search(r"^services:\n(.*?)^volumes:", text, flags=re.MULTILINE | re.DOTALL)
    assert services is not None
    names = re.findall(r"^  (\w+):$", services[1], flags=re.MULTILINE)
    assert names == ["luthier", "database"]
    assert "@database/luthier" in services[1] and "dockerfile: deploy/Dockerfile" in services[1]
    found = re.search(r"^    shm_size: (\d+)gb$", services[1], flags=re.MULTILINE)
    assert found is not None and int(found[1]) >= 1, (
        "an encrypted store needs more than 64 MB there"
    )
    assert "127.0.0.1:8080" in services[1], "it is published on loopback only"
