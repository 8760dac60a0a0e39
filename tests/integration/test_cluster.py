"""Which Ray a job runs on: one that is named, one that runs here already, or one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ResourcesConfig
from pipeline.errors import ResourceError
from pipeline.execution.cluster import ray_cluster
from tests.ray_start import started

ROOT = Path(__file__).resolve().parents[2]


def cpus(environment: dict[str, str], **resources: Any) -> float:
    """CPUs of the Ray that a fresh process gets for these settings."""
    code = f"""
import ray
from pipeline.execution.cluster import ray_cluster
from pipeline.config import ResourcesConfig
with ray_cluster(ResourcesConfig(**{resources!r}), print):
    print("CPUs", ray.cluster_resources()["CPU"])
"""
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )
    found = re.search(r"CPUs ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    """Address of a Ray with seven CPUs, started where jobs without an address look for one."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 7, "num_gpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_a_job_joins_the_ray_that_runs_here_unless_it_asks_for_one_of_its_own(running: str) -> None:
    assert cpus({}) == 7
    assert cpus({"RAY_ADDRESS": running}, num_cpus=3) == 7, "an address is an address"
    assert cpus({}, num_cpus=3) == 3
    assert cpus({"RAY_ADDRESS": running}, address="local", num_cpus=3) == 3
    assert cpus({"RAY_ADDRESS": "local"}, num_cpus=3) == 3


def test_ray_s_client_is_refused_with_the_way_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may have started one
    for resources, environment in ((ResourcesConfig(address="ray://head:10001"), ""), (ResourcesConfig(), "ray://a:1")):
        monkeypatch.setenv("RAY_ADDRESS", environment)
        with (
            pytest.raises(ResourceError, match=r"jobs.submit --address http://HOST:8265"),
            ray_cluster(resources, print),
        ):
            pass


def test_a_thread_that_outlives_the_job_does_not_connect_to_ray_again() -> None:
    """As the executor of a dataset that broke when a node was lost."""
    code = """
import os, ray, threading
from pipeline.config import ResourcesConfig
from pipeline.execution.cluster import ray_cluster

with ray_cluster(ResourcesConfig(address="local", num_cpus=1), print):
    pass
environment = dict(os.environ)
late = threading.Thread(target=ray.put, args=("a table",))
late.start()
late.join()
assert not ray.is_initialized()
assert os.environ == environment, "it goes to the command that starts again"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Ray has not been started yet" in done.stderr, "the thread's own error"


@pytest.mark.slow
def test_a_process_that_had_a_ray_of_its_own_joins_a_cluster_without_tokens() -> None:
    """As two jobs in one notebook."""
    head = """
import ray, sys
from tests.ray_start import started
context = started(lambda: ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000))
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
    code = """
import ray, sys
from pipeline.config import ResourcesConfig
from pipeline.execution.cluster import ray_cluster

class Actor:
    def answer(self): return 7

for resources in ({"address": "local", "num_cpus": 1}, {"address": sys.argv[1]}):
    with ray_cluster(ResourcesConfig(**resources), print):
        actor = ray.remote(Actor).remote()
        assert ray.get(actor.answer.remote()) == 7
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started_head = subprocess.Popen(
        [sys.executable, "-c", head], cwd=ROOT, env={**clean, "RAY_AUTH_MODE": "disabled"}, **pipes
    )
    try:
        assert started_head.stdout is not None
        command = [sys.executable, "-c", code, started_head.stdout.readline().strip()]
        done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300)
    finally:
        started_head.communicate()
    assert done.returncode == 0, done.stderr
