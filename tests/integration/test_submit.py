"""Submitting: words, tokens, paths, what is sent; against small real servers. test_submit_cluster.py has a cluster."""

from __future__ import annotations

import http.server
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.command_line import parse_words
from jobs.submit import (
    ROOT,
    Cluster,
    entrypoint,
    find_cluster,
    find_token,
    main,
    read_words,
    runtime_environment,
    settled_paths,
)
from pipeline.errors import ClusterError, ConfigError
from tests.integration.ray_head import free_ports

HERE = Cluster("http://127.0.0.1:8265", None, is_here=True)
FAR = Cluster("http://head:8265", None, is_here=False)
DEMO = str(ROOT / "configs" / "demo.yaml")


def test_the_address_is_given_or_comes_from_ray_s_variables() -> None:
    words = ["--config", "a.yaml", "--input.path", "x", "--no-wait"]
    asked = read_words([*words, "--address", "http://head:8265/"], {"RAY_ADDRESS": "http://other:1"})
    assert (asked.address, asked.wait, asked.config_paths) == ("http://head:8265", False, ["a.yaml"])
    assert asked.overrides == {"input.path": "x"}
    assert read_words(words, {"RAY_ADDRESS": "http://other:1"}).address == "http://other:1"
    with pytest.raises(ConfigError, match="no cluster named"):
        read_words(words, {})
    with pytest.raises(ConfigError, match="expected the dashboard's address"):
        read_words(words, {"RAY_ADDRESS": "head:6379"})
    with pytest.raises(ConfigError, match="--env conda: allowed"):
        read_words([*words, "--address", "http://head:8265", "--env", "conda"], {})


def test_a_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from the default file\n")
    assert find_token({}) == "from the default file"
    named = tmp_path / "named"
    named.write_text("from the named file")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(named)}) == "from the named file"
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(named), "RAY_AUTH_TOKEN": "given"}) == "given"
    assert find_token({"RAY_AUTH_TOKEN": "given", "RAY_AUTH_MODE": "disabled"}) is None
    named.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(named)})
    with pytest.raises(ConfigError, match=r"can't read .*nowhere"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")})


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


def test_what_answers_wrongly_or_not_at_all_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at {nobody}"):
        find_cluster(nobody, None)
    with server(401) as address, pytest.raises(ClusterError, match="asks for a token, and none was found here"):
        find_cluster(address, None)
    with server(403) as address, pytest.raises(ClusterError, match=r"refused the token .* `ray get-auth-token`"):
        find_cluster(address, "wrong")
    with server(200, b"<html>hello</html>") as address, pytest.raises(ClusterError, match="not as a Ray dashboard"):
        find_cluster(address, None)
    assert main(["--address", nobody, "--config", DEMO]) == 1
    assert capsys.readouterr().err.startswith("error: no Ray dashboard answers")


def test_relative_paths_are_made_absolute_here_and_refused_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = {"input.path": "s3://data/in", "output.path": "/shared/out", "model.path": "Qwen/Qwen2-VL-2B-Instruct"}
    assert settled_paths(kept, HERE) == settled_paths(kept, FAR) == {}
    assert settled_paths({"output.path": "out/a", "model.path": "demo"}, HERE) == {
        "output.path": str(tmp_path / "out/a")
    }
    with pytest.raises(ConfigError, match=r"output\.path: out/a is relative, and http://head:8265 is another machine"):
        settled_paths({"output.path": "out/a"}, FAR)
    (tmp_path / "weights").mkdir()
    assert settled_paths({"model.path": "weights"}, HERE) == {"model.path": str(tmp_path / "weights")}
    with pytest.raises(ConfigError, match=r"model\.path"):
        settled_paths({"model.path": "weights"}, FAR)


def test_the_command_survives_a_shell_with_every_override_as_it_was() -> None:
    overrides = {"prompt.template": "It's a {kind}; $HOME?", "input.columns": '{"image": "url"}', "run.verbose": "true"}
    command = shlex.split(entrypoint("caption", [DEMO], overrides))
    assert command[:4] == ["exec", "python", "-m", "jobs.caption"]
    assert parse_words(command[4:]) == ([os.path.join("configs", "demo.yaml")], overrides)
    with pytest.raises(ConfigError, match="not among the files that are sent"):
        entrypoint("caption", ["/elsewhere/mine.yaml"], {})


def test_the_demo_s_checkpoint_is_sent_only_where_it_is_asked_for() -> None:
    real = runtime_environment("none", {"model.path": "Qwen/Qwen2-VL-2B-Instruct", "output.path": "/o"})
    assert real["excludes"] == ["/pipeline/demo/checkpoint"] and "pip" not in real
    assert runtime_environment("none", {"model.path": "demo"})["excludes"] == []


def test_pip_gets_the_dependencies_and_their_pins_but_never_ray() -> None:
    packages = runtime_environment("pip", {"model.path": "m", "output.path": "s3://b/o"})["pip"]["packages"]
    assert packages[0].startswith("-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt")
    assert {"torch>=2.11", "transformers>=5.17", "s3fs>=2024.6"} <= set(packages)
    assert not any(package.startswith(("ray", "gcsfs")) for package in packages)
