"""Tests of ``deploy/``: started programs exist and accept the options."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import luthier
from luthier.cli.app import app
from luthier.server.http.application import OPEN_PATHS

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
def test_options_of_image_command_exist(command: list[str]) -> None:
    assert Path(command[0]).name == "luthier" and command[1] == "serve"
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for param in serve.params for option in param.opts}
    assert {each for each in command[2:] if each.startswith("--")} <= known


def test_extras_in_image_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    found = re.search(r"'\.\[([\w,]+)\]'", text)
    assert found is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(found[1].split(",")) <= project["optional-dependencies"].keys()


def test_references_between_compose_services() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    services = re.search(r"^services:\n(.*?)^volumes:", text, flags=re.MULTILINE | re.DOTALL)
    assert services is not None
    names = re.findall(r"^  (\w+):$", services[1], flags=re.MULTILINE)
    assert names == ["luthier", "database"]
    assert "@database/luthier" in services[1] and "dockerfile: deploy/Dockerfile" in services[1]
    found = re.search(r"^    shm_size: (\d+)gb$", services[1], flags=re.MULTILINE)
    assert found is not None and int(found[1]) >= 1
    assert "127.0.0.1:8080" in services[1], "it is published on loopback only"


KUBERNETES = DEPLOY / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def test_kustomization_lists_all_files_and_image_version() -> None:
    (found,) = documents("kustomization.yaml")
    named = {*found["resources"], *(each["path"] for each in found["patches"])}
    assert named == {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert found["images"] == [{"name": "luthier", "newTag": luthier.__version__}]


def test_pods_are_unprivileged_and_probe_existing_routes() -> None:
    (patch,) = documents("pod.yaml")
    pod = patch["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    uid = re.search(r"--uid (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert uid is not None and pod["securityContext"]["runAsUser"] == int(uid[1])
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")]
    assert probes == ["/healthz", "/readyz"] and set(probes) <= set(OPEN_PATHS)
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    home = re.search(r"LUTHIER_HOME=(\S+)", (DEPLOY / "Dockerfile").read_text())
    assert home is not None and mounts["store"] == home[1]
    assert {each["name"] for each in pod["volumes"]} == mounts.keys()
    secrets = [each for each in container["env"] if "KEY" in each["name"] or "DATA" in each["name"]]
    assert len(secrets) == 1 and all("secretKeyRef" in each["valueFrom"] for each in secrets)


def test_private_network_replaces_open_policy() -> None:
    (found,) = documents("private-network/kustomization.yaml")
    (deleted,) = [yaml.safe_load(each["patch"]) for each in found["patches"]]
    assert deleted["$patch"] == "delete"
    names = {each["metadata"]["name"] for each in documents("network.yaml")}
    assert deleted["metadata"]["name"] in names
    (policy,) = documents("private-network/policy.yaml")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 443, 5432}


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_encrypted_volume_classes_share_a_name(name: str) -> None:
    (found,) = documents(f"encrypted-volume/{name}.yaml")
    assert (found["kind"], found["metadata"]["name"]) == ("StorageClass", "luthier-encrypted")


def test_options_of_server_and_worker_exist() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for param in serve.params for option in param.opts}
    server, service = documents("server.yaml")
    (worker,) = documents("worker.yaml")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["--no-workers"] and set(container["args"]) <= known
    assert "args" not in worker["spec"]["template"]["spec"]["containers"][0]
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == server["spec"]["selector"]["matchLabels"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_builds_valid_manifests() -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=True
    ).stdout
    found = list(yaml.safe_load_all(built))
    pods = [each["spec"]["template"]["spec"] for each in found if each["kind"] == "Deployment"]
    assert len(pods) == 2 and all(
        pod["containers"][0]["image"] == f"luthier:{luthier.__version__}"
        and len(pod["containers"]) == 1
        for pod in pods
    )
    assert all(each["metadata"]["namespace"] == "luthier" for each in found)
    schema = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for document in found:
        schema.validate(document, "1.35", strict=True)
