"""Which Ray a job joins, and what it says of one that does not answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import ResourcesConfig
from pipeline.errors import ResourceError
from pipeline.execution import address
from pipeline.execution.address import init_options


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_JOIN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(address, "_RECORDED_TIMEOUT_S", 0.2)
    monkeypatch.setattr(address, "read_ray_address", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_answers_is_joined_and_named_at_once(listening: str) -> None:
    said: list[str] = []
    assert init_options(ResourcesConfig(address=listening), said.append) == {"address": listening}
    assert said == [f"joining the Ray cluster at {listening} (resources.address)"]


def test_a_cluster_that_does_not_answer_is_named_with_where_the_address_is_from(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(
        ResourceError, match=rf"no Ray answered at {dead} \(RAY_ADDRESS\) within 0 s.*unset the address"
    ):
        init_options(ResourcesConfig(), print)
    with pytest.raises(ResourceError, match="expected HOST:PORT, auto or local"):
        init_options(ResourcesConfig(address="http://head:8265"), print)


def test_a_ray_that_was_started_here_and_is_gone_is_not_waited_for(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "read_ray_address", lambda: dead)
    assert init_options(ResourcesConfig(), print)["address"] == "local"
    with pytest.raises(ResourceError, match="no longer answers"):
        init_options(ResourcesConfig(address="auto"), print)


def test_a_home_that_cannot_be_written_needs_no_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    init_options(ResourcesConfig(), print)
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    init_options(ResourcesConfig(), print)
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32
