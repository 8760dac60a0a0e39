"""Submitting: arguments, tokens, paths, what is sent; against small real servers. The cluster is in
test_submit_cluster.py."""

from __future__ import annotations

import http.server
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.command_line import parse_arguments
from jobs.submit import ROOT, absolute_paths, entrypoint, main, runtime_environment
from pipeline.errors import ClusterError, ConfigError
from pipeline.execution.dashboard import connect, use_token
from tests.integration.ray_head import free_ports

FAR = "http://head:8265"
DEMO = str(ROOT / "configs" / "demo.yaml")


def test_the_address_is_given_or_comes_from_ray_s_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    monkeypatch.setenv("RAY_ADDRESS", nobody[1])
    arguments = ["--config", DEMO, "--input.path", "x", "--no-wait"]
    assert main([*arguments, "--address", f"{nobody[0]}/"]) == 1
    assert f"no Ray dashboard answers at {nobody[0]} " in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", nobody[1])
    assert main(arguments) == 1
    assert f"no Ray dashboard answers at {nobody[1]} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "more", "expected"),
    [
        (None, [], "arguments are required: --address"),
        ("head:6379", [], "found head:6379; expected a dashboard's address"),
        (FAR, ["--env", "conda"], "invalid choice: 'conda'"),
        (FAR, ["--job", "plan"], "invalid choice: 'plan'"),
    ],
)
def test_wrong_arguments_are_refused(
    address: str | None,
    more: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SystemExit, match="2"):
        main(["--config", DEMO, *more])
    assert expected in capsys.readouterr().err


def test_a_token_is_used_where_ray_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert not use_token()
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "given")
            patch.setenv("RAY_AUTH_MODE", "disabled")
            assert not use_token()
            patch.delenv("RAY_AUTH_MODE")
            assert use_token() and os.environ["RAY_AUTH_MODE"] == "token"
            del os.environ["RAY_AUTH_MODE"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from the default file\n")
    assert use_token()
    del os.environ["RAY_AUTH_MODE"]


@contextmanager
def server(status: int, body: bytes = b"") -> Iterator[str]:
    """A web server that answers everything alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def test_what_answers_wrongly_or_not_at_all_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at {nobody}"):
        connect(nobody)
    for status in (401, 403):
        with server(status) as address, pytest.raises(ClusterError, match=r"asks for a token: .* `ray get-auth-token`"):
            connect(address)
    with server(200, b"<html>hello</html>") as address, pytest.raises(ClusterError, match="not as a Ray dashboard"):
        connect(address)
    with server(500) as address, pytest.raises(ClusterError, match="not as a Ray dashboard"):
        connect(address)
    assert main(["--address", nobody, "--config", DEMO]) == 1
    assert capsys.readouterr().err.startswith("error: no Ray dashboard answers")


def test_relative_paths_are_made_absolute_here_and_refused_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = {"input.path": "s3://data/in", "output.path": "/shared/out", "model.path": "Qwen/Qwen2-VL-2B-Instruct"}
    assert absolute_paths(kept, FAR, is_here=True) == absolute_paths(kept, FAR, is_here=False) == {}
    assert absolute_paths({"output.path": "out/a", "model.path": "demo"}, FAR, is_here=True) == {
        "output.path": str(tmp_path / "out/a")
    }
    with pytest.raises(ConfigError, match=r"output\.path: out/a is relative, and http://head:8265 is another machine"):
        absolute_paths({"output.path": "out/a"}, FAR, is_here=False)
    (tmp_path / "weights").mkdir()
    assert absolute_paths({"model.path": "weights"}, FAR, is_here=True) == {"model.path": str(tmp_path / "weights")}
    with pytest.raises(ConfigError, match=r"model\.path"):
        absolute_paths({"model.path": "weights"}, FAR, is_here=False)


def test_the_command_survives_a_shell_with_every_override_as_it_was() -> None:
    overrides = {"prompt.template": "It's a {kind}; $HOME?", "input.columns": '{"image": "url"}', "run.verbose": "true"}
    command = shlex.split(entrypoint("caption", [DEMO], overrides))
    assert command[:4] == ["exec", "python", "-m", "jobs.caption"]
    assert parse_arguments(command[4:]) == ([os.path.join("configs", "demo.yaml")], overrides)
    with pytest.raises(ConfigError, match="not among the files that are sent"):
        entrypoint("caption", ["/elsewhere/mine.yaml"], {})


def test_the_demo_s_checkpoint_is_sent_only_where_it_is_asked_for() -> None:
    real = runtime_environment("none", {"model.path": "Qwen/Qwen2-VL-2B-Instruct", "output.path": "/o"})
    assert real["excludes"] == ["/pipeline/demo/checkpoint"] and "pip" not in real
    assert runtime_environment("none", {"model.path": "demo"})["excludes"] == []


@pytest.mark.parametrize(("path", "package"), [("s3a://b/o", "s3fs"), ("gcs://b/o", "gcsfs"), ("gs://b/o", "gcsfs")])
def test_pip_gets_the_file_system_of_every_spelling_of_a_bucket(path: str, package: str) -> None:
    packages = runtime_environment("pip", {"model.path": "m", "output.path": path})["pip"]["packages"]
    assert any(one.startswith(package) for one in packages)


def test_pip_gets_the_dependencies_and_their_pins_but_never_ray() -> None:
    packages = runtime_environment("pip", {"model.path": "m", "output.path": "s3://b/o"})["pip"]["packages"]
    assert packages[0].startswith("-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt")
    assert {"torch>=2.11", "transformers>=5.17", "s3fs>=2024.6"} <= set(packages)
    assert not any(package.startswith(("ray", "gcsfs")) for package in packages)
