"""The KubeRay files: every field is one that KubeRay 1.6.2 or Kubernetes knows, and the numbers fit each other."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.command_line import parse_arguments
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.execution.placement import Node, place
from tests.unit.configs.kuberay_schema import problems, quantity

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "configs" / "cluster"
FILES = ("kuberay-job.yaml", "kuberay-cluster.yaml")
GIB = 1024**3

Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_document(name: str) -> Document:
    (found,) = [one for one in documents(name) if one["apiVersion"] == "ray.io/v1"]
    return found


def cluster_spec(name: str) -> Document:
    spec: Document = ray_document(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> Iterator[Document]:
    """The head's group and the workers' ones."""
    spec = cluster_spec(name)
    yield spec["headGroupSpec"]
    yield from spec["workerGroupSpecs"]


def pod_specs(name: str) -> Iterator[Document]:
    for group in groups(name):
        yield group["template"]["spec"]
    submitter = ray_document(name)["spec"].get("submitterPodTemplate")
    if submitter:
        yield submitter["spec"]


def pin(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{package} has no line in constraints.txt"
    return found[1]


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known_has_its_type_and_none_is_missing(name: str) -> None:
    for document in documents(name):
        assert problems(document) == []


def _worker(job: Document) -> Document:
    group: Document = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


def _container(job: Document) -> Document:
    container: Document = _worker(job)["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda job: job.update(apiVersion="ray.io/v2"), "apiVersion: found 'ray.io/v2'"),
        (lambda job: job["spec"].update(entryPoint="x"), "RayJob.spec.entryPoint: unknown field"),
        (
            lambda job: job["spec"].update(backoffLimit="3"),
            "RayJob.spec.backoffLimit: found '3', expected type integer",
        ),
        (lambda job: job["spec"].update(submissionMode="Http"), "RayJob.spec.submissionMode: found 'Http'; allowed"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "rayClusterSpec.headGroupSpec: missing"),
        (lambda job: _worker(job).pop("groupName"), "workerGroupSpecs[0].groupName: missing"),
        (lambda job: _worker(job).update(maxReplica=3), "workerGroupSpecs[0].maxReplica: unknown field"),
        (lambda job: _worker(job)["rayStartParams"].update({"num-cpus": 4}), "num-cpus: found 4, expected type string"),
        (lambda job: _container(job).pop("name"), "containers[0].name: missing"),
        (lambda job: _container(job).update(volumeMount=[]), "containers[0].volumeMount: unknown field"),
        (lambda job: _container(job)["volumeMounts"][0].pop("mountPath"), "volumeMounts[0].mountPath: missing"),
        (lambda job: _container(job)["resources"]["limits"].update(memory="96 GB"), "limits.memory: found '96 GB'"),
        (lambda job: _container(job)["securityContext"].update(runAsNonRoot="yes"), "runAsNonRoot: found 'yes'"),
    ],
)
def test_a_spoilt_file_is_found_out(spoil: Callable[[Document], Any], expected: str) -> None:
    job = json.loads(json.dumps(ray_document("kuberay-job.yaml")))  # parts that anchors share become separate ones
    spoil(job)
    (problem,) = problems(job)
    assert expected in problem


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_project(name: str) -> None:
    assert cluster_spec(name)["rayVersion"] == pin("ray")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for pod in pod_specs(name) for container in pod["containers"]}
    assert images == {f"REGISTRY/qwen2-vl-batch:{version}"}


@pytest.mark.parametrize("name", FILES)
def test_what_the_operator_refuses_is_not_there(name: str) -> None:
    """KubeRay's own rules for the token and for autoscaler v2, beyond the schema."""
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(int(part) for part in spec["rayVersion"].split(".")[:2]) >= (2, 52)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in groups(name):
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        names = [one["name"] for one in group["template"]["spec"]["containers"][0].get("env", [])]
        assert "RAY_enable_autoscaler_v2" not in names
        assert not [one for one in names if one.startswith("RAY_AUTH")], "the operator sets the token's variables"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", FILES)
def test_no_container_runs_as_root_or_without_limits(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    for pod in pod_specs(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            for kind in ("cpu", "memory"):
                assert quantity(container["resources"]["requests"][kind]) <= quantity(
                    container["resources"]["limits"][kind]
                )


@pytest.mark.parametrize("name", FILES)
def test_mounts_name_volumes_and_volumes_name_claims(name: str) -> None:
    claims = {one["metadata"]["name"] for one in documents(name) if one["kind"] == "PersistentVolumeClaim"}
    for pod in pod_specs(name):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == set(volumes)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


@pytest.mark.parametrize("name", FILES)
def test_shared_memory_holds_the_object_store_and_fits_the_container(name: str) -> None:
    for group in groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm"]
        (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        size = quantity(volume["emptyDir"]["sizeLimit"])
        memory = quantity(container["resources"]["limits"]["memory"])
        # Without a size of its own the object store takes 30 % of the container's memory.
        store = float(group["rayStartParams"].get("object-store-memory", 0.3 * memory))
        assert store < size < memory / 2


def test_groups_with_gpus_and_without() -> None:
    for name in FILES:
        gpus = {
            group["groupName"]: int(
                group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
            )
            for group in cluster_spec(name)["workerGroupSpecs"]
        }
        assert gpus == {"gpu": 1, "cpu": 0}


def test_the_job_s_entrypoint_loads_and_fits_the_cluster_that_it_starts_on() -> None:
    words = shlex.split(ray_document("kuberay-job.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.caption"]
    paths, overrides = parse_arguments(words[3:])
    # The Dockerfile copies the configs there.
    config = load_config(CaptionConfig, [str(ROOT / Path(path).relative_to("/app")) for path in paths], overrides)
    for replicas, engines in (("minReplicas", 0), ("maxReplicas", 1)):
        nodes = [
            Node(f"{group['groupName']}-{number}", quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", 0)))
            for group in cluster_spec("kuberay-job.yaml")["workerGroupSpecs"]
            for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]]
            for number in range(group[replicas])
        ]
        placement = place(config.resources, nodes)
        assert placement.notes == ()
        assert placement.engine_actors == placement.engine_pool[engines] == sum(node.gpus for node in nodes)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_placeholder_is_marked(path: Path) -> None:
    lines = path.read_text().splitlines()
    unmarked = [line for line in lines if "REGISTRY" in line.partition("#")[0] and "EDIT" not in line]
    assert unmarked == []
    assert sum("EDIT:" in line for line in lines) >= 5
