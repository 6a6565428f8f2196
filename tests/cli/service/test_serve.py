"""Options of ``luthier serve`` before the server starts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.cli.service.serve import ROOT_KEYS, _print_addresses, parse_graders
from luthier.errors import RefusedInput
from luthier.server.service import LAMBDA
from luthier.server.stores.bootstrap import IssuedKeys
from luthier.server.tables.database import Database


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Restore settings of the test process that ``serve`` changes."""
    loggers = [logging.getLogger(name) for name in ("luthier", "uvicorn.error")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    interval, mask = sys.getswitchinterval(), os.umask(0o077)
    yield
    os.umask(mask)
    sys.setswitchinterval(interval)
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    return done.output


def test_serve_rejects_unknown_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LUTHIER_BACKEND", "warp")
    assert "LUTHIER_BACKEND" in refused()


@pytest.mark.parametrize("port", ["-1", "80000"])
def test_serve_rejects_invalid_port(port: str) -> None:
    """The system would use the port modulo 65,536."""
    answer = CliRunner().invoke(app, ["serve", "--port", port])
    assert answer.exit_code == 2 and "'--port': Input should be" in answer.output


def test_graders_are_named_and_checked(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('method = "exact"\n')
    bad.write_text('method = "telepathy"\n')
    assert parse_graders([f"reward={good}"]) == {"reward": {"method": "exact"}}
    handler, source = (
        tmp_path / "handler.py",
        "def lambda_handler(event, context):\n    return []\n",
    )
    handler.write_text(source)
    own = {"method": "lambda", "name": "own", "source": source}
    assert parse_graders([f"own={handler}"]) == {"own": own}
    bad.with_suffix(".py").write_text("def handler(event):\n    return []\n")
    for given in (
        f"own={bad.with_suffix('.py')}",
        f"not a name={handler}",
        f"own={tmp_path}/no.py",
        "reward",
        "=x",
        "reward=",
        f"reward={bad}",
        f"reward={tmp_path / 'none.toml'}",
    ):
        with pytest.raises(RefusedInput):
            parse_graders([given])


@pytest.mark.parametrize(
    ("arn", "name"),
    [
        ("arn:aws:lambda:us-east-1:000000000000:function:reward", "reward"),
        ("arn:aws:lambda:us-east-1:000000000000:function:reward:7", "reward"),
        ("arn:aws:lambda:us-east-1:000000000000:function:", None),
        ("arn:aws:s3:us-east-1:000000000000:function:reward", None),
        ("reward", None),
    ],
)
def test_functions_are_known_by_name(arn: str, name: str | None) -> None:
    found = LAMBDA.fullmatch(arn)
    assert (found["name"] if found else None) == name


def test_serve_rejects_invalid_options(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("no certificate")
    assert "--tls-key" in refused("--tls-cert", str(file))
    assert "not a file" in refused("--tls-cert", str(file), "--tls-key", str(tmp_path / "none"))
    for rate in ("-1", "nan", "inf"):
        assert f"--requests-per-second {rate}" in refused("--requests-per-second", rate)
    assert "mysql://a/b" in refused("--database", "mysql://a/b")


def test_serve_requires_server_key_of_store(
    database: Database, api_key: str, luthier_home: Path
) -> None:
    done = CliRunner().invoke(app, ["serve", "--port", "0"])
    assert done.exit_code == 1, done.output
    assert "server.key" in done.output
    assert not (luthier_home / "server.key").exists()


ISSUED = IssuedKeys("000000000000", "root", "AKIA1", "secret-1", "sk-1")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    _print_addresses("http://127.0.0.1:1", "us-east-1", ISSUED, "torch", False, 0)
    return capsys.readouterr().out


def test_keys_of_first_start_on_terminal(
    luthier_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = printed(capsys)
    assert "export AWS_SECRET_ACCESS_KEY=secret-1\nexport OPENAI_BASE_URL=http" in shown
    assert "export OPENAI_API_KEY=sk-1\n" in shown
    assert not (luthier_home / ROOT_KEYS).exists()


def test_keys_of_first_start_in_private_file_without_terminal(
    luthier_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, file = printed(capsys), luthier_home / ROOT_KEYS
    assert str(file) in shown
    assert "secret-1" not in shown and "sk-1" not in shown
    assert file.stat().st_mode & 0o777 == 0o600
    names = [line.partition("=")[0] for line in file.read_text().splitlines()]
    assert names[0] == "export AWS_ENDPOINT_URL" and len(names) == 7
    assert file.read_text().endswith("export OPENAI_API_KEY=sk-1\n")


WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None  # as without the package
from luthier.cli.app import app
app({arguments!r})
"""


@pytest.mark.parametrize(
    "arguments", [["serve"], ["admin", "users", "list"], ["admin", "keys", "create", "ann"],
                  ["admin", "audit", "--json"]],
)  # fmt: skip
def test_commands_without_server_extra_name_extra(arguments: list[str], luthier_home: Path) -> None:
    names = ["alembic", "botocore", "cryptography", "sqlalchemy", "uvicorn"]
    program = WITHOUT.format(names=names, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].endswith("pip install 'luthier[server]'"), done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)["error"]["type"] == "RefusedInput"
    assert not luthier_home.exists()
