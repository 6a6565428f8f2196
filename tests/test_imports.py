"""Tests of import time, public names and import directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import jsonl

import luthier

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch", "transformers", "peft", "matplotlib", "safetensors", "huggingface_hub", "psutil",
    "scipy", "sklearn",
)  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    script = f"{code}\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def running(*arguments: str) -> str:
    return (
        "import contextlib, sys\n"
        "from luthier.cli.app import main\n"
        f"sys.argv = {['luthier', *arguments]!r}\n"
        "with contextlib.suppress(SystemExit): main()"
    )


@pytest.mark.parametrize(
    "code",
    ["import luthier", running("--help"), running("--version"), running("tune", "--help")],
    ids=["import", "help", "version", "tune-help"],
)
def test_light_entry_points_skip_heavy_imports(code: str) -> None:
    loaded = loaded_after(code)
    assert "luthier" in loaded
    assert not loaded & {*HEAVY, "numpy", "rich"}


@pytest.mark.parametrize("command", [["tune"], ["evaluate", "all-minilm-l6-v2"]], ids=" ".join)
def test_missing_file_is_reported_before_heavy_imports(command: list[str]) -> None:
    assert not loaded_after(running(*command, "none.jsonl")) & {*HEAVY}


@pytest.mark.parametrize(
    "code",
    [
        "import luthier.recipe; luthier.Recipe",
        "import luthier.workflows.pretrain_recipe",
        "luthier.tune, luthier.load, luthier.inspect",
    ],
    ids=["recipe", "pretrain-recipe", "sdk"],
)
def test_recipes_and_the_sdk_load_no_torch(code: str) -> None:
    assert not loaded_after(f"import luthier\n{code}") & set(HEAVY)


@pytest.mark.parametrize(("before", "after"), [("", "5000"), ("900", "900")])
def test_waiting_threads_do_not_spin_for_long(before: str, after: str) -> None:
    """OpenMP reads the variable when torch is loaded."""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": before} if before else {}
    code = "import luthier, os; print(os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == after


def test_invalid_recipe_is_rejected_before_torch_import() -> None:
    code = running("tune", "rows.jsonl", "--set", "adaptation.rnk=8", "--json")
    assert not loaded_after(code) & {"torch", "transformers"}


def test_public_names_exist() -> None:
    assert luthier.__all__ == sorted(luthier.__all__)
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    assert luthier._HOMES.keys() | {"__version__"} == set(luthier.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        luthier.nothing  # noqa: B018


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert luthier.__version__ == version("luthier")


def test_import_contracts_are_satisfied(tmp_path: Path) -> None:
    """The import-linter contract of pyproject.toml."""
    script = Path(sys.executable).with_name("lint-imports")
    if not script.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [str(script), "--cache-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


WINGS = ("media", "server", "cluster", "migrate", "exports")
CORE = """
import sys
import luthier

base, rows = sys.argv[1:]
assert luthier.inspect(rows, base=base).files
result = luthier.tune(rows, base=base, name="core", training__max_steps=1)
print(luthier.load(result.model_id).generate("Hello", max_tokens=2))
"""


@pytest.mark.slow
def test_core_works_without_optional_packages(
    luthier_home: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    core = tmp_path / "core" / "luthier"
    core.mkdir(parents=True)
    for part in (ROOT / "src" / "luthier").iterdir():
        if part.name not in WINGS:
            (core / part.name).symlink_to(part)
    examples = ({"prompt": f"{n}?", "completion": "Yes"} for n in range(60))
    rows = jsonl(tmp_path / "rows.jsonl", *examples)
    arguments = [sys.executable, "-c", CORE, str(tiny_model_folder), str(rows)]
    environment = {**os.environ, "PYTHONPATH": str(core.parent)}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
