"""Launch files: parsed by the target's own tools, run with stub programs, attacked with file names."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.cluster.launch import (
    HOME,
    LaunchRequest,
    Target,
    launch_file,
    recipe_text,
    render,
    size_job,
)
from luthier.engine.machine import Machine
from luthier.errors import RecipeError, UnknownModel
from luthier.recipe import Recipe
from luthier.workflows.estimate.estimate import Estimate, PredictionInterval

TARGETS: tuple[Target, ...] = get_args(Target)
FOUND = Estimate(
    key="0123456789abcdef", machine="a processor, 2 cores, 8 GiB", created="2026-11-24T00:00:00+00:00",
    base="tiny", objective="sft", adaptation="lora", rows=60, steps=30, refit_steps=0, epochs=2.0,
    tokens=PredictionInterval.exactly(9000), learned=PredictionInterval.exactly(3000), parts={},
    seconds=PredictionInterval(7000, 6500, 7200), memory=PredictionInterval(2e9, 1.9e9, 2.2e9),
    disk=PredictionInterval(5e8, 4e8, 1e9),
    modelled_memory=2_000_000_000,
    tried=[(100, 1.0)],
)  # fmt: skip
PROCESSOR = Machine(torch.device("cpu"), torch.float32, 2, "a test")
CARD = Machine(torch.device("cuda"), torch.bfloat16, 16, "a test")
EVIL = (
    "it's \"$(touch pwned)\" `touch pwned`; touch pwned\nRECIPE\ntouch pwned\n# {{ 7 * 7 }} \\ '''"
    "\u2028\u0085\x1b[2J\r\x07 %j : - &"
)
"""A folder name that would break out of quotes, here-documents, comments and templates."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Callable[..., Recipe]:
    def make(folder: str = "my data", **fields: Any) -> Recipe:
        path = tmp_path / folder / "rows.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"base": str(tiny_model_folder), "name": "colours", "data": {"train": str(path)}}
        return Recipe.parse({**given, **fields})

    return make


def documents(text: str) -> dict[str, dict[str, Any]]:
    """Return the documents of a Kubernetes file by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def recipe_in(target: Target, text: str) -> dict[str, Any]:
    """Return the recipe of a launch file, parsed as on the cluster."""
    if target == "kubernetes":
        text = documents(text)["ConfigMap"]["data"]["recipe.toml"]
    elif target == "ray":
        tree = ast.parse(text)
        value = next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RECIPE"
        )
        text = ast.literal_eval(value)
    else:
        script = text if target == "slurm" else yaml.safe_load(text)["run"]
        found = re.search(r"<<'RECIPE'\n(.*?)\nRECIPE\n", script, flags=re.DOTALL)
        assert found is not None
        text = found[1]
    return tomllib.loads(text)


def stand_ins(folder: Path, *names: str) -> Path:
    """Write stub programs that record arguments and recipe."""
    folder.mkdir()
    for name in names:
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, sys\n"
            "recipe = next((a for a in sys.argv if a.endswith('.toml')), None)\n"
            "said = {'argv': sys.argv, 'home': os.environ.get('LUTHIER_HOME'),\n"
            "        'threads': os.environ.get('OMP_NUM_THREADS'),\n"
            "        'recipe': open(recipe, encoding='utf-8').read() if recipe else None}\n"
            f"open({str(folder / (name + '.json'))!r}, 'a').write(json.dumps(said) + '\\n')\n"
            f"print('node-7' if {name!r} == 'scontrol' else '')\n"
        )
        program.chmod(0o755)
    return folder


def calls(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]


def bash(script: Path, tools: Path, **variables: str) -> None:
    environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", **variables}
    subprocess.run(["bash", script], cwd=script.parent, env=environment, check=True, timeout=30)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (4, 1), (2, 3)])
def test_no_name_breaks_out_of_a_file(
    target: Target, processes: int, nodes: int, recipe: Callable[..., Recipe], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    home = tmp_path / EVIL[:120] / "home"
    home.mkdir(parents=True)
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    evil = recipe(EVIL)
    text = launch_file(evil, FOUND, LaunchRequest(target, processes, nodes, gpu="H100"), PROCESSOR)
    assert all(each.isprintable() or each == "\n" for each in text) or target == "slurm"
    carried = recipe_in(target, text)
    train = carried["data"]["train"]
    if target in ("slurm", "ray"):
        assert train == evil.data.train
    else:
        assert train == "/luthier/data/rows.jsonl"
    assert carried["name"] == "colours"
    if target == "slurm":
        script = tmp_path / "job.sh"
        script.write_text(text)
        tools = stand_ins(tmp_path / "tools", "srun", "scontrol")
        bash(script, tools, SLURM_JOB_ID="12", SLURM_JOB_NODELIST="node-[7-9]")
        (call,) = calls(tools, "srun")
        assert call["home"] == str(home) and call["threads"] == "2"
        assert tomllib.loads(call["recipe"])["data"]["train"] == evil.data.train
    elif target == "skypilot":
        task = yaml.safe_load(text)
        assert task["file_mounts"]["/luthier/data/rows.jsonl"] == evil.data.train
        script = tmp_path / "job.sh"
        script.write_text(task["run"])
        tools = stand_ins(tmp_path / "tools", "luthier", "torchrun")
        bash(
            script,
            tools,
            SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
            SKYPILOT_NODE_RANK="0",
            SKYPILOT_TASK_ID="t",
        )
        (call,) = calls(tools, "torchrun" if nodes > 1 else "luthier")
        assert tomllib.loads(call["recipe"])["data"]["train"] == train
    elif target == "ray":
        compile(text, "job.py", "exec")
    assert not list(tmp_path.rglob("pwned"))


def test_template_rejects_unquoted_values() -> None:
    with pytest.raises(TypeError):
        render(
            "slurm.sh.jinja", {"title": "x", "measured": "y", "label": "z", "nodes": "3; reboot"}
        )


def test_slurm_script_requests_nodes_memory_and_rendezvous(recipe: Callable[..., Recipe]) -> None:
    request = LaunchRequest("slurm", processes=4, nodes=2, gpu="H100")
    text = launch_file(recipe(), FOUND, request, PROCESSOR)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "4" and options["cpus-per-task"] == "8"
    # Four times 2.2 GB plus 25 %, and 1 GB for communication.
    assert options["mem"] == "12G"
    assert options["time"] == "0-03:00:00", "7,200 s and half as much again"
    assert "requeue" in options and options["signal"] == "B:USR1@120"
    body = text[text.index("set -euo") :]
    assert "#SBATCH" not in body, "Slurm reads no option behind the first command"
    assert "is_host=$((SLURM_NODEID == 0))" in body and '"$meeting" "$recipe"' in body
    assert "--no-python luthier tune" in body and "--resume" in body


@pytest.mark.parametrize("before_the_wait", ["", "sleep 0.3\n"], ids=["waiting", "not yet"])
def test_slurm_job_requeues_before_time_limit(
    recipe: Callable[..., Recipe], tmp_path: Path, before_the_wait: str
) -> None:
    script = tmp_path / "job.sh"
    text = launch_file(recipe(), FOUND, LaunchRequest("slurm"), PROCESSOR)
    assert text.count("--resume &\n") == 1
    script.write_text(text.replace("--resume &\n", f"--resume &\n{before_the_wait}"))
    tools = stand_ins(tmp_path / "tools", "scontrol")
    # Signals the batch script before the time limit, and exits at SIGTERM like a run.
    programs = {
        "srun": "trap 'echo checkpoint > ended; exit 1' TERM; echo $$ > pid; kill -USR1 $PPID\n"
        "for _ in $(seq 100); do sleep 0.1; done\n",
        "scancel": '[ "$*" = "--signal=TERM 12" ] && kill -TERM "$(cat pid)"\n',
    }
    for name, program in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{program}")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}
    for restarts, again in (("0", 1), ("10", 0)):
        environment["SLURM_RESTART_COUNT"] = restarts
        (tools / "scontrol.json").unlink(missing_ok=True)
        ended = subprocess.run(["bash", script], cwd=tmp_path, env=environment, timeout=30)
        assert ended.returncode == 1
        assert (tmp_path / "ended").read_text() == "checkpoint\n"
        said = calls(tools, "scontrol") if (tools / "scontrol.json").exists() else []
        assert [each["argv"][1:] for each in said] == [["requeue", "12"]] * again


@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (2, 3)])
def test_kubernetes_documents_match_schema(
    processes: int, nodes: int, recipe: Callable[..., Recipe]
) -> None:
    schema = pytest.importorskip("kubernetes_validate")
    request = LaunchRequest("kubernetes", processes, nodes, gpu="H100")
    for document in documents(launch_file(recipe(), FOUND, request, PROCESSOR)).values():
        schema.validate(document, "1.35", strict=True)


def test_multi_node_job_uses_first_pod_as_rendezvous(recipe: Callable[..., Recipe]) -> None:
    request = LaunchRequest("kubernetes", processes=2, nodes=3, gpu="H100")
    found = documents(launch_file(recipe(), FOUND, request, PROCESSOR))
    job = found["Job"]["spec"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 3
    pod = job["template"]["spec"]
    name = found["Service"]["metadata"]["name"]
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert found["Service"]["spec"]["clusterIP"] == "None" and pod["subdomain"] == name
    command = pod["containers"][0]["command"]
    assert command[command.index("--rdzv-endpoint") + 1] == f"{name}-0.{name}:29500"
    assert command[-5:] == [
        "--no-python",
        "luthier",
        "tune",
        "/etc/luthier/recipe.toml",
        "--resume",
    ]
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "7Gi", "nvidia.com/gpu": "2"}


def test_kubernetes_job_is_suspended_until_files_are_copied(recipe: Callable[..., Recipe]) -> None:
    text = launch_file(recipe(), FOUND, LaunchRequest("kubernetes"), PROCESSOR)
    assert documents(text)["Job"]["spec"]["suspend"] is True
    copied = re.findall(r"^#   kubectl cp (.*) luthier-colours-data:(\S+)$", text, re.MULTILINE)
    assert [there for _, there in copied] == [
        "/luthier/data/rows.jsonl", "/luthier/data/tiny-llama"
    ]  # fmt: skip
    assert recipe_in("kubernetes", text)["base"] == "/luthier/data/tiny-llama"


def test_image_rows_are_mounted_with_folder(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("L", (8, 8)).save(pictures / "1.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "1.png", "label": "one"}\n')
    asked = recipe(data={"train": str(pictures / "metadata.jsonl")})
    text = launch_file(asked, FOUND, LaunchRequest("skypilot"), PROCESSOR)
    assert yaml.safe_load(text)["file_mounts"]["/luthier/data/pictures"] == str(pictures)
    assert recipe_in("skypilot", text)["data"]["train"] == "/luthier/data/pictures/metadata.jsonl"


def test_stored_base_model_is_copied_to_volume(
    recipe: Callable[..., Recipe], luthier_home: Path, tiny_model_folder: Path
) -> None:
    folder = luthier_home / "models" / "base" / "mine"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "luthier.json").write_text(json.dumps({"id": "mine"}))
    from luthier.library.models import find

    assert find("mine").folder == folder
    text = launch_file(recipe(base="mine"), FOUND, LaunchRequest("kubernetes"), PROCESSOR)
    assert f"kubectl cp {folder} luthier-colours-data:{HOME}/models/base/mine" in text


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_task_matches_schema(nodes: int, recipe: Callable[..., Recipe]) -> None:
    request = LaunchRequest("skypilot", processes=2, nodes=nodes, gpu="H100", image="r/luthier:1")
    task = yaml.safe_load(launch_file(recipe(), FOUND, request, PROCESSOR))
    assert task["num_nodes"] == nodes and task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["cpus"] == "4+" and task["resources"]["memory"] == "7+"
    assert ("volumes" in task) == (nodes > 1)
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    from jsonschema import validate

    validate(task, schemas.get_task_schema())
    validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        if not isinstance(mount, str):
            validate({k: v for k, v in mount.items() if k != "mode"}, schemas.get_storage_schema())
            assert mount["mode"] in __import__("sky").StorageMode.__members__


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "failures"), [(1, 0), (2, 1)])
def test_ray_runs_the_script(
    processes: int, failures: int, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    script = tmp_path / "job.py"
    request = LaunchRequest("ray", processes, seconds=3600)
    machine = replace(PROCESSOR, threads=1)
    small = replace(FOUND, memory=PredictionInterval.exactly(1e8))
    script.write_text(launch_file(recipe(), small, request, machine))
    package = tmp_path / "modules" / "luthier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    log = tmp_path / "log"
    (package / "__main__.py").write_text(
        "import json, os, sys\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    said = [sys.argv[1:], os.environ['LUTHIER_HOME'], open(sys.argv[2]).read()]\n"
        "    file.write(json.dumps(said) + '\\n')\n"
        f"sys.exit(len(open({str(log)!r}).readlines()) <= {failures})\n"
    )
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=240)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(said) == 1 + failures
    argv, home, carried = said[-1]
    assert argv[0] == "tune" and "--resume" in argv and home == os.environ["LUTHIER_HOME"]
    assert ("--processes" in argv) == (processes > 1)
    assert tomllib.loads(carried)["data"]["train"] == recipe().data.train


def test_gpu_name_is_parsed_from_estimated_machine() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "Tesla T4": "T4",
        "NVIDIA L40S": "L40S", "Tesla V100-SXM2-16GB": "V100", "NVIDIA H200": "H200",
    }  # fmt: skip
    for device, name in names.items():
        found = replace(FOUND, machine=device)
        sizing = size_job(found, LaunchRequest("ray", processes=8), CARD)
        assert (sizing.gpu, sizing.gpus, sizing.cpus) == (name, 8, 32)
    assert size_job(found, LaunchRequest("ray", gpu="none"), CARD).gpus == 0
    with pytest.raises(RecipeError):
        size_job(replace(FOUND, machine="a thing"), LaunchRequest("ray"), CARD)


def test_recipe_threads_include_all_processes_of_node(recipe: Callable[..., Recipe]) -> None:
    given = recipe(training={"threads": 2})
    text = launch_file(given, FOUND, LaunchRequest("slurm", processes=4), PROCESSOR)
    assert recipe_in("slurm", text)["training"]["threads"] == 8
    assert "--cpus-per-task=8" in text


def test_given_time_is_used_as_limit() -> None:
    sizing = size_job(FOUND, LaunchRequest("slurm", seconds=90), PROCESSOR)
    assert sizing.seconds == 90 and sizing.reasons["time"] == "Time: 90 s by option."
    short = replace(FOUND, seconds=PredictionInterval.exactly(5))
    assert size_job(short, LaunchRequest("slurm"), PROCESSOR).seconds == 600


WRONG: list[dict[str, Any]] = [
    {"target": "pbs"},
    {"target": "slurm", "nodes": 0},
    {"target": "slurm", "processes": -1},
    {"target": "slurm", "gpu": "H100; reboot"},
    {"target": "slurm", "image": "a b"},
    {"target": "ray", "image": "luthier"},
    {"target": "slurm", "seconds": 5},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_launch_request_is_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        LaunchRequest(**wrong)


def test_file_name_outside_utf8_is_rejected(recipe: Callable[..., Recipe]) -> None:
    broken = recipe(data={"train": "/data/caf\udce9.jsonl"})
    with pytest.raises(RecipeError) as refused:
        recipe_text(broken, "x", {})
    assert refused.value.rule == "recipe.encoding"


@pytest.mark.slow
def test_launch_command_estimates_and_writes_script(
    recipe: Callable[..., Recipe], tmp_path: Path, in_float32: None
) -> None:
    asked = recipe()
    output = tmp_path / "job.sh"
    options = ["--on", "slurm", "--time", "90m", "--base", asked.base, "--epochs", "1"]
    done = CliRunner().invoke(app, ["launch", asked.data.train, *options, "--output", str(output)])
    assert done.exit_code == 0, done.output
    text = output.read_text()
    assert "#SBATCH --time=0-01:30:00" in text
    carried = recipe_in("slurm", text)
    assert carried["name"] == "rows-1" and carried["training"] == {"epochs": 1.0}
    assert carried["base"] == asked.base
    same = luthier.launch(asked, on="slurm", nodes=2)
    assert "#SBATCH --nodes=2" in same


def test_launch_command_reports_errors(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def refusal(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["launch", *arguments])
        assert done.exit_code == 2, done.output
        return done.stderr

    rows = recipe().data.train
    assert "missing.toml: [file.missing]" in refusal(str(tmp_path / "missing.toml"), "--on", "ray")
    assert "missing.jsonl" in refusal(str(tmp_path / "missing.jsonl"), "--on", "ray")
    assert "nodes must be" in refusal(rows, "--on", "ray", "--nodes", "0")
    assert "'pbs' is not one of" in refusal(rows, "--on", "pbs")
    assert "'nobody'" in refusal(rows, "--on", "ray", "--base", "nobody")
    assert "'soon'" in refusal(rows, "--on", "ray", "--time", "soon")
    assert "is a folder" in refusal(rows, "--on", "ray", "--output", str(tmp_path))
    with pytest.raises(UnknownModel):
        luthier.launch(rows, on="ray", base="nobody")
