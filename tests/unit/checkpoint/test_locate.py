"""A checkpoint's files, from a folder or from the hub, and what is said when they can't be had."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.locate import check_model, find_file
from pipeline.demo import CHECKPOINT
from pipeline.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0" * 40
REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/unknown": (401, "RepoNotFound"),
    "org/model@v9": (404, "RevisionNotFound"),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for `org/model`, which has a config.json, and refuses the others."""

    def do_HEAD(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        refused = REFUSALS.get(name) or REFUSALS.get(f"{name}@{revision}")
        if refused is None and file != "config.json":
            refused = (404, "EntryNotFound")
        if refused is not None:
            self.send_response(refused[0])
            self.send_header("X-Error-Code", refused[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = json.dumps({"model_type": "qwen2_vl"}).encode()
        self.send_response(200)
        for header, value in {"ETag": '"e"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


ASK = """
import json, sys, time
from pipeline.checkpoint.locate import check_model, find_file
from pipeline.errors import CheckpointError
time.sleep = lambda seconds: print("pause")  # between the client's attempts
for name, file, revision in json.loads(sys.argv[1]):
    try:
        found = find_file(name, file, revision=revision) if file else check_model(name, revision=revision)
        print(found and found.read_text())
    except CheckpointError as error:
        print("refused:", error)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def ask(endpoint: str, home: Path, *questions: tuple[str, str | None, str | None]) -> list[str]:
    """What `find_file` says, or without a file `check_model`, in a process of its own, since the hub's client reads its
    settings when it is loaded."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert "thrown while requesting" not in done.stderr and "Retrying" not in done.stderr
    return lines


def test_files_of_a_hub_name_are_found_missing_or_refused_with_the_reason(hub: str, tmp_path: Path) -> None:
    found, missing, gated, unknown, revision, malformed = ask(
        hub,
        tmp_path,
        ("org/model", "config.json", None),
        ("org/model", "chat_template.json", None),
        ("org/gated", "config.json", None),
        ("org/unknown", "config.json", None),
        ("org/model", "config.json", "v9"),
        ("no/such/folder", "config.json", None),
    )
    assert found == '{"model_type": "qwen2_vl"}'
    assert missing == "None"
    assert gated.startswith("refused: 'org/gated' is a gated repository: accept its terms on the hub and set HF_TOKEN")
    assert unknown.startswith("refused: the hub has no 'org/unknown': set model.path")
    assert revision.startswith("refused: the hub has no 'org/model' at revision 'v9'")
    assert malformed.startswith("refused: the hub has no 'no/such/folder'")


def test_a_hub_that_can_t_be_reached_leaves_its_cache_and_is_waited_for_once(hub: str, tmp_path: Path) -> None:
    ask(hub, tmp_path, ("org/model", "config.json", None))
    nowhere = "http://127.0.0.1:9"
    cached, *pauses, missing, refused = ask(
        nowhere,
        tmp_path,
        ("org/model", "config.json", None),
        ("org/model", "chat_template.json", None),
        ("org/other", None, None),
    )
    assert cached == '{"model_type": "qwen2_vl"}'
    assert set(pauses) <= {"pause"}
    assert missing == "None"
    assert refused == (
        "refused: can't find config.json in 'org/other': the hub can't be reached ([Errno 111] Connection refused); "
        "set model.path to a folder with a Qwen-VL checkpoint or to a hub name that this machine can reach"
    )


def test_files_of_a_folder() -> None:
    assert find_file(str(CHECKPOINT), "config.json") == CHECKPOINT / "config.json"
    assert find_file(str(CHECKPOINT), "vocab.json") is None


def test_a_folder_that_is_no_qwen2_vl_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't find config\.json"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model type 'llama'; this pipeline runs qwen2_vl"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(CheckpointError, match="the weights are missing"):
        check_model(str(tmp_path))
    check_model(str(tmp_path), weights=False)
