"""A checkpoint in a bucket comes to a machine once, whole, and is used like a folder."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import cache as model_cache
from pipeline.checkpoint.cache import ModelCache
from pipeline.demo import CHECKPOINT
from pipeline.errors import CheckpointError
from tests.servers.s3 import Fault, S3Server, s3_server

pytest.importorskip("s3fs", reason="pip install 'qwen2-vl-batch[s3]' to run these")

URL = "s3://models/demo"


@pytest.fixture
def bucket() -> Iterator[S3Server]:
    with s3_server() as server:
        server.make_bucket("models")
        for path in sorted(CHECKPOINT.iterdir()):
            server.client().put_object(Bucket="models", Key=f"demo/{path.name}", Body=path.read_bytes())
        for extra in ("pytorch_model.bin", "original/weights.safetensors"):
            server.client().put_object(Bucket="models", Key=f"demo/{extra}", Body=b"not needed")
        server.requests.clear()
        yield server


def cache(server: S3Server, folder: Path) -> ModelCache:
    return ModelCache(str(folder), server.storage_options)


def downloads(server: S3Server) -> list[str]:
    """Keys whose content was asked for."""
    found = [request.removeprefix("GET /models/demo/") for request in server.requests if request.startswith("GET")]
    return sorted(name for name in found if "." in name)


def fetch(server: S3Server, folder: Path, start: Any, answers: Any) -> None:
    start.wait()
    answers.put(cache(server, folder).local(URL, weights=True))


def test_actors_that_ask_at_once_make_one_download(bucket: S3Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    client = S3Server(bucket.endpoint)
    processes = [context.Process(target=fetch, args=(client, tmp_path, start, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {answers.get(timeout=200) for _ in processes}
    for process in processes:
        process.join(30)
    (folder,) = folders
    expected = sorted(path.name for path in CHECKPOINT.iterdir())
    assert sorted(path.name for path in Path(folder).iterdir()) == expected
    assert all((Path(folder) / name).read_bytes() == (CHECKPOINT / name).read_bytes() for name in expected)
    assert downloads(bucket) == expected


def test_cpu_actors_fetch_the_small_files_alone(bucket: S3Server, tmp_path: Path) -> None:
    small = cache(bucket, tmp_path).local(URL, weights=False)
    assert "config.json" in downloads(bucket)
    assert not any(name.endswith(".safetensors") for name in downloads(bucket))
    bucket.requests.clear()
    assert cache(bucket, tmp_path).local(URL, weights=True) == small
    assert [name for name in downloads(bucket) if not name.endswith(".safetensors")] == []


def test_what_a_killed_download_left_is_gone_on_with(bucket: S3Server, tmp_path: Path) -> None:
    folder = Path(cache(bucket, tmp_path).local(URL, weights=True))
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / f".{weights.name}.1-abc.tmp")  # killed before it could be renamed
    (folder / "config.json").write_bytes(b"{")  # cut short, as a full disk does
    bucket.requests.clear()
    assert cache(bucket, tmp_path).local(URL, weights=True) == str(folder)
    assert downloads(bucket) == sorted([weights.name, "config.json"])
    assert (folder / "config.json").read_bytes() == (CHECKPOINT / "config.json").read_bytes()


def test_a_connection_that_breaks_is_tried_again(bucket: S3Server, tmp_path: Path) -> None:
    bucket.faults += [Fault(503, method="GET"), Fault(cut_after=100, method="GET")]
    folder = Path(cache(bucket, tmp_path).local(URL, weights=True))
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in CHECKPOINT.iterdir())


def test_a_changed_checkpoint_gets_a_folder_of_its_own(bucket: S3Server, tmp_path: Path) -> None:
    before = cache(bucket, tmp_path).local(URL, weights=False)
    config = json.loads((CHECKPOINT / "config.json").read_text()) | {"changed": True}
    bucket.client().put_object(Bucket="models", Key="demo/config.json", Body=json.dumps(config).encode())
    after = cache(bucket, tmp_path).local(URL, weights=False)
    assert before != after
    assert json.loads((Path(after) / "config.json").read_text())["changed"]


def test_a_prefix_without_a_checkpoint_says_what_it_holds(bucket: S3Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"s3://models/demo/original holds weights.safetensors; expected"):
        cache(bucket, tmp_path).local(f"{URL}/original", weights=True)
    with pytest.raises(CheckpointError, match=r"s3://models/nothing holds nothing; expected a checkpoint"):
        cache(bucket, tmp_path).local("s3://models/nothing", weights=True)
    with pytest.raises(CheckpointError, match=r"s3://no-such-bucket/x"):
        cache(bucket, tmp_path).local("s3://no-such-bucket/x", weights=True)


def test_a_disk_that_is_too_small_is_named_before_the_download(
    bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs .* GB in .*set model.cache_dir to a larger disk"):
        cache(bucket, tmp_path).local(URL, weights=True)
    assert downloads(bucket) == []


def test_folders_and_hub_names_pass_through(tmp_path: Path) -> None:
    for path in (str(CHECKPOINT), "Qwen/Qwen2-VL-2B-Instruct"):
        assert ModelCache(str(tmp_path / "unused")).local(path, weights=True) == path
        assert ModelCache(str(tmp_path / "unused")).local_adapter(path) == path
    assert not (tmp_path / "unused").exists()


def test_an_adapter_in_a_bucket_comes_like_a_checkpoint(bucket: S3Server, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        bucket.client().put_object(Bucket="models", Key=f"lora/{name}", Body=b"{}")
    folder = Path(cache(bucket, tmp_path).local_adapter("s3://models/lora"))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"model\.adapter s3://models/demo holds .*expected an adapter: adapter_conf"
    ):
        cache(bucket, tmp_path).local_adapter(URL)
