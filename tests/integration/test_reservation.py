"""Two jobs on one cluster: each gets all that it needs, or waits and holds nothing. What is held is used again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from pipeline.config import ResourcesConfig
from pipeline.config_values import PoolSize
from pipeline.execution import reservation
from pipeline.execution.placement import Node, place
from pipeline.execution.reservation import reserve

pytestmark = pytest.mark.usefixtures("ray_with_two_cpus")


def test_a_second_job_waits_with_nothing_in_its_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(reservation, "_REMIND_S", 0.5)
    asked = ResourcesConfig(preprocess_actors=PoolSize(2, 2), preprocess_cpus=0.4, engine_cpus=0.4)
    placement = place(asked, [Node("a", cpus=2, gpus=0)])
    said: list[str] = []
    is_held, is_done = threading.Event(), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        is_held.set()

    def second() -> None:
        with reserve(placement, tell):
            is_held.set()
            assert is_done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        with reserve(placement, print):
            job = pool.submit(second)
            assert is_held.wait(60)
            assert "need 1.2 CPUs (0.8 of the cluster's 2 are free)" in said[0]
            assert ray.available_resources()["CPU"] == pytest.approx(0.8)
            is_held.clear()
        is_done.set()
        job.result(timeout=60)


class Actor:
    def is_up(self) -> bool:
        return True


@pytest.mark.parametrize("num_cpus", [0.4, 0])  # an engine on a GPU reserves no CPUs of its bundle
def test_a_bundle_is_free_while_no_actor_is_in_it(monkeypatch: pytest.MonkeyPatch, num_cpus: float) -> None:
    monkeypatch.setattr(reservation, "_SETTLED_S", 0.0)
    monkeypatch.setattr(reservation, "_RESTART_S", 0.0)
    asked = ResourcesConfig(preprocess_actors=PoolSize(1, 2), preprocess_cpus=0.4, engine_cpus=0.4)

    def wait_for(bundle: int | None) -> None:
        deadline = time.monotonic() + 60
        while (found := share._free_bundle()) != bundle and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == bundle

    with reserve(place(asked, [Node("a", cpus=2, gpus=0)]), print) as held:
        share = held.preprocessing()
        for _ in range(2):
            wait_for(1)
            actor = ray.remote(num_cpus=num_cpus)(Actor).options(**share.options()).remote()
            assert ray.get(actor.is_up.remote(), timeout=60)
            wait_for(None)
            ray.kill(actor)
