"""The cluster launcher's files, as Ray's own checks and its autoscaler see them, and as the clouds' APIs do."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import googleapiclient.discovery_cache
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "cluster"
FILES = ("aws.yaml", "gcp.yaml")

Config = dict[str, Any]


def read(name: str) -> Config:
    config: Config = yaml.safe_load((CLUSTER / name).read_text())
    return config


def prepared(config: Config) -> AutoscalingConfig:
    """What `ray up` makes of a file before it asks the cloud: defaults laid under it, checked by Ray's schema."""
    return AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    nodes = prepared(read(name)).get_node_type_configs()
    assert set(nodes) == {"head", "gpu-spot", "gpu-on-demand", "cpu-spot", "cpu-on-demand"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(max_worker=3),
        lambda config: config.update(idle_timeout_minutes="five"),
        lambda config: config["docker"].update(images="x"),
        lambda config: config["available_node_types"]["gpu-spot"].pop("node_config"),
        lambda config: config["available_node_types"]["gpu-spot"]["resources"].update(GPU="1"),
        lambda config: config.update(head_node_type="haed"),
    ],
)
def test_ray_refuses_a_spoilt_file(name: str, spoil: Callable[[Config], Any]) -> None:
    config = read(name)
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError, KeyError)):
        prepared(config)


def launched(name: str, demand: dict[str, float], count: int, **scores: float) -> dict[str, int]:
    """Nodes that Ray's autoscaler starts for so many demands, by node type, on a cluster without workers.

    `scores`: how available a node type was lately, 0 to 1, underscores for dashes.
    """
    config = prepared(read(name))
    types = config.get_node_type_configs()
    for one in types.values():
        one.min_worker_nodes = 0
    del types["head"]
    availability = {node_type.replace("_", "-"): score for node_type, score in scores.items()}
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)] * count),
        cloud_resource_availabilities=availability,
        recoverable_resource_availabilities=availability,
    )
    reply = ResourceDemandScheduler(AutoscalerEventLogger(_Silent())).schedule(request)
    assert not reply.infeasible_resource_requests
    return {one.instance_type: one.count for one in reply.to_launch}


class _Silent:
    """An event log that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.mark.parametrize("name", FILES)
class TestAutoscaling:
    def test_engines_get_spot_nodes_first(self, name: str) -> None:
        assert launched(name, {"GPU": 1, "CPU": 1}, 3) == {"gpu-spot": 3}

    def test_without_spot_nodes_they_get_on_demand_ones(self, name: str) -> None:
        assert launched(name, {"GPU": 1, "CPU": 1}, 3, gpu_spot=0.0) == {"gpu-on-demand": 3}

    def test_beyond_the_spot_nodes_allowed_they_get_on_demand_ones(self, name: str) -> None:
        assert launched(name, {"GPU": 1, "CPU": 1}, 10) == {"gpu-spot": 8, "gpu-on-demand": 2}

    def test_preprocessing_gets_nodes_without_gpus(self, name: str) -> None:
        assert launched(name, {"CPU": 1}, 40) == {"cpu-spot": 2}
        assert launched(name, {"CPU": 1}, 40, cpu_spot=0.0) == {"cpu-on-demand": 2}


@pytest.mark.parametrize("name", FILES)
def test_every_node_has_the_token_and_is_told_that_it_counts(name: str) -> None:
    config = read(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert any("ray get-auth-token --generate" in line for line in (CLUSTER / name).read_text().splitlines()[:8])


@pytest.mark.parametrize("name", FILES)
def test_spot_and_on_demand_nodes_are_alike_but_for_the_price(name: str) -> None:
    types = read(name)["available_node_types"]
    for kind in ("gpu", "cpu"):
        spot, standard = types[f"{kind}-spot"], types[f"{kind}-on-demand"]
        assert spot["resources"] == standard["resources"]
        assert spot["priority"] > standard["priority"]
        for key in ("InstanceType", "ImageId", "machineType", "guestAccelerators", "disks"):
            assert spot["node_config"].get(key) == standard["node_config"].get(key)


def test_amazon_knows_every_field_of_the_nodes() -> None:
    """Against the published model of EC2's RunInstances, which comes with boto3."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in read("aws.yaml")["available_node_types"].items():
        values = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(values, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert set(values) <= set(shape.members), name
    spoilt = {**values, "InstanceMarketOptions": {"MarketTyp": 3}, "Instancetype": "x"}
    report = ParamValidator().validate(spoilt, shape).generate_report()
    assert "MarketTyp" in report
    assert not set(spoilt) <= set(shape.members)


@pytest.mark.slow
def test_amazon_starts_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own way from the file to machines, roles, keys and networks, with an EC2 that is simulated (moto)."""
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setattr(aws_config, "time", _Hasty())  # it gives new roles a quarter of a minute to be known
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.client("ec2", region_name="us-west-2")
        boto3.client("iam").create_instance_profile(InstanceProfileName="EDIT")
        config = read("aws.yaml")
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for node in config["available_node_types"].values():
            node["node_config"]["ImageId"] = image
        started = aws_config.bootstrap_aws(prepare_config(config))
        provider = AWSNodeProvider(started["provider"], started["cluster_name"])
        for node in started["available_node_types"].values():
            provider.create_node(node["node_config"], {TAG_RAY_NODE_KIND: "worker"}, 1)
        found = [
            (machine["InstanceType"], machine.get("InstanceLifecycle"))
            for reservation in ec2.describe_instances()["Reservations"]
            for machine in reservation["Instances"]
        ]
    gpu, cpu = "g6e.4xlarge", "c7i.8xlarge"
    assert found == [("m7i.2xlarge", None), (gpu, "spot"), (gpu, None), (cpu, "spot"), (cpu, None)]


class _Hasty:
    """A clock that does not wait."""

    def sleep(self, seconds: float) -> None:
        pass

    def time(self) -> float:
        return time.time()


def test_google_knows_every_field_of_the_nodes() -> None:
    """Against the published description of Compute Engine's Instance, which comes with Google's client."""
    folder = Path(googleapiclient.discovery_cache.__file__).parent / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]
    for name, node in read("gcp.yaml")["available_node_types"].items():
        assert list(_google_problems(node["node_config"], {"$ref": "Instance"}, schemas, name)) == []
    spoilt = {"machinetype": "x", "disks": [{"boot": "yes"}], "scheduling": {"provisioningModel": "CHEAP"}}
    assert len(list(_google_problems(spoilt, {"$ref": "Instance"}, schemas, "spoilt"))) == 3


def _google_problems(value: Any, schema: Config, schemas: Config, path: str) -> Iterator[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    python = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    wanted = python[schema["type"]]
    # The API writes 64-bit integers as strings, and takes both.
    if schema.get("format") in ("int64", "uint64"):
        wanted = (str, int)
    if not isinstance(value, wanted):  # type: ignore[arg-type]
        yield f"{path}: found {value!r}, expected {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{path}: found {value!r}; allowed: {schema['enum']}"
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _google_problems(one, schema["items"], schemas, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, one in value.items():
            if name in schema.get("properties", {}):
                yield from _google_problems(one, schema["properties"][name], schemas, f"{path}.{name}")
            elif "additionalProperties" not in schema:
                yield f"{path}.{name}: unknown field"
