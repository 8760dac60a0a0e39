"""Every config under configs/ loads by the command that it opens with, and that command runs, on a small scale."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import caption
from jobs.command_line import parse_arguments
from jobs.evaluate import EvaluateConfig
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.demo.scenes import Picture, draw_picture
from pipeline.demo.tasks import example
from pipeline.errors import ResourceError
from pipeline.execution.placement import Node, place
from pipeline.planning.plan import PlanConfig
from pipeline.planning.roofline import SHAPES, Gpu, min_gpus

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "cluster"
)
READY_MADE = ["configs/caption.yaml", *(name for name in CONFIGS if name.startswith("configs/jobs/"))]
SCALES = [name for name in CONFIGS if re.fullmatch(r"configs/scale/\d+b-\w+\.yaml", name)]
MODELS = [name for name in CONFIGS if name.startswith("configs/scale/") and name not in SCALES]
JOBS = {"caption": CaptionConfig, "evaluate": EvaluateConfig, "plan": PlanConfig}
SMALL = {"model.path": "demo", "media.max_pixels": 28 * 28 * 16, "media.min_pixels": 28 * 28 * 4}
"""What stands in for a real model on a machine without a GPU."""
CLUSTERS = {
    "1gpu": [Node("a", 8, 1)],
    "8gpu": [Node("a", 64, 8)],
    "nodes": [*(Node(name, 64, 8) for name in "abcd"), Node("e", 32, 0)],
}
"""What the scales are made for."""


def comment(config: str) -> list[str]:
    """The lines of the comment that a config opens with, without their marks."""
    lines = (ROOT / config).read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def commands(config: str) -> list[tuple[str, list[str]]]:
    """(job, arguments) of every command in that comment; a backslash continues it in the next line."""
    text = "\n".join(comment(config)).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if line.startswith("    python -m jobs."):
            _, _, module, *words = shlex.split(line)
            found.append((module.removeprefix("jobs."), words))
    return found


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_loads_by_the_command_it_opens_with(config: str) -> None:
    assert commands(config), f"{config} does not say how it is run"
    for job, words in commands(config):
        paths, overrides = parse_arguments(words)
        assert config in paths
        load_config(JOBS[job], paths, overrides)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("job", READY_MADE)
def test_a_scale_fits_over_every_job_and_on_the_cluster_it_is_for(job: str, scale: str) -> None:
    alone, config = load_config(CaptionConfig, job, {}), load_config(CaptionConfig, [job, scale], {})
    assert config.prompt == alone.prompt
    assert config.sampling == alone.sampling
    model, _, size = Path(scale).stem.partition("-")
    assert f"-{model.upper()}-" in config.model.path
    nodes = CLUSTERS[size]
    placement = place(config.resources, nodes)
    assert placement.notes == ()
    assert placement.engine_actors == placement.engine_pool[1]
    assert placement.engine_actors * placement.gpus_per_engine == sum(node.gpus for node in nodes)
    fewer = [Node("a", 64, 7), *nodes[1:]]
    if size == "nodes":  # a pool: what does not fit yet is no error
        assert placement.engine_pool[0] <= place(config.resources, fewer).engine_actors < placement.engine_actors
    else:
        with pytest.raises(ResourceError, match=r"lower resources\.engine_actors"):
            place(config.resources, fewer if size == "8gpu" else [Node("a", 8, 0)])


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_an_engine_on_each_gpu_and_fits_over_a_scale(model: str) -> None:
    alone, scaled = (
        load_config(CaptionConfig, ["configs/caption.yaml", *configs], {})
        for configs in ([model], ["configs/scale/7b-8gpu.yaml", model])
    )
    for config in (alone, scaled):
        assert Path(model).stem in config.model.path.lower()
        placement = place(config.resources, CLUSTERS["8gpu"])
        assert (placement.engine_actors, placement.gpus_per_engine) == (8, 1)
    # As many GPUs an engine as a plan finds necessary with 32 GB.
    shape, small = SHAPES[Path(model).stem], Gpu("", 1e12, 1e12, 32)
    assert min_gpus(shape, small, cache_tokens=32_768, memory_fraction=0.9) == 1


def run(config: str, source: Path, output: Path, **overrides: Any) -> list[dict[str, Any]]:
    """Runs a config's own command with a small model and input in place of the documented ones; its result rows."""
    job, words = commands(config)[0]
    assert job == "caption"
    overrides = {"input.path": source, "output.path": output, "input.limit": 2, **SMALL, **overrides}
    # A word given twice: the later one counts.
    words = [*words, *(word for name, value in overrides.items() for word in (f"--{name}", str(value)))]
    assert caption.main(words) == 0
    parts = sorted(output.glob("part-*.parquet"))
    assert parts
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def pictures(folder: Path, photos: Path) -> Path:
    folder.mkdir()
    for name in ("astronaut.png", "rocket.jpg"):
        shutil.copy(photos / name, folder / name)
    return folder


def yes_no_questions(folder: Path) -> Path:
    """A manifest of the demo world's yes-or-no questions about pictures, with the right answers."""
    folder.mkdir()
    rows = []
    for index in range(12):
        made = example("yes_no", "held-out", 0, index)
        (picture,) = made.media
        assert isinstance(picture, Picture)
        Image.fromarray(draw_picture(picture)).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "prompt": made.question, "reference": made.answer})
    manifest = folder / "questions.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    return manifest


def run_filter_recipe(output: Path) -> dict[str, Any]:
    """What the Python of configs/jobs/filter.yaml leaves in its variables, over the parts in a folder."""
    recipe = [line.strip()[4:] for line in comment("configs/jobs/filter.yaml") if line.strip().startswith(">>> ")]
    known: dict[str, Any] = {}
    exec("\n".join(recipe).replace("out/filter", str(output)), known)
    return known


def test_an_answer_that_is_neither_yes_nor_no_has_no_probability_of_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, answers in enumerate([[("Yes", 0.95), ("The", 0.05)], [("no", 0.97), ("No", 0.04), (None, None)]]):
        rows = [
            {"status": "ok" if text else "error", "text": text, "logprobs": [math.log(p)] if p else None}
            for text, p in answers
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"part-{part}.parquet")
    known = run_filter_recipe(tmp_path)
    assert known["rows"]["p_yes"].tolist() == pytest.approx([0.95, math.nan, 0.03, 0.04, math.nan], nan_ok=True)
    assert known["kept"]["text"].tolist() == ["Yes"]
    assert capsys.readouterr().out == "answers that are neither yes nor no: 1\n"


@pytest.mark.usefixtures("ray_with_two_cpus")
class TestReadyMadeConfigs:
    """With the demo checkpoint, which talks nonsense about photographs: what is looked at is the rest of the job."""

    def test_filter_gives_each_row_the_probability_of_yes(self, tmp_path: Path) -> None:
        source, output = yes_no_questions(tmp_path / "world"), tmp_path / "out"
        rows = run("configs/jobs/filter.yaml", source, output, **{"input.limit": 12, "input.keep": "reference"})
        assert {row["text"] for row in rows} == {"Yes", "No"}
        known = run_filter_recipe(output)
        found = known["rows"]
        assert ((found["p_yes"] >= 0) & (found["p_yes"] <= 1)).all()
        assert ((found["p_yes"] > 0.5) == (found["reference"] == "Yes.")).all()
        assert 0 < len(known["kept"]) < len(found) == 12

    def test_vqa_asks_each_row_its_own_question(self, tmp_path: Path, photos: Path) -> None:
        folder = pictures(tmp_path / "photos", photos)
        with (folder / "questions.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerows([["image", "question"], ["astronaut.png", "Who?"], ["rocket.jpg", "What, and where?"]])
        rows = run("configs/jobs/vqa.yaml", folder / "questions.csv", tmp_path / "out", **{"sampling.max_tokens": 2})
        assert [(row["status"], row["question"]) for row in rows] == [("ok", "Who?"), ("ok", "What, and where?")]
        assert rows[0]["prompt_hash"] != rows[1]["prompt_hash"]
        assert [row["media"][0]["source"].rpartition("/")[2] for row in rows] == ["astronaut.png", "rocket.jpg"]

    @pytest.mark.slow
    @pytest.mark.parametrize("config", ["configs/caption.yaml", "configs/jobs/alt_text.yaml", "configs/jobs/ocr.yaml"])
    def test_jobs_on_a_folder_of_pictures(self, config: str, tmp_path: Path, photos: Path) -> None:
        source = pictures(tmp_path / "photos", photos)
        rows = run(config, source, tmp_path / "out", **{"sampling.max_tokens": 4})
        assert [row["status"] for row in rows] == ["ok", "ok"]
        assert all(0 < row["num_output_tokens"] <= 4 for row in rows)

    @pytest.mark.slow
    def test_dense_video_sees_frames_at_the_rate_it_says(self, tmp_path: Path, clips: Path) -> None:
        (tmp_path / "clips").mkdir()
        shutil.copy(clips / "bikes.mp4", tmp_path / "clips")
        small = {"media.video_max_pixels": 128 * 28 * 28, "sampling.max_tokens": 4}
        (row,) = run("configs/jobs/dense_video.yaml", tmp_path / "clips", tmp_path / "out", **small)
        assert row["status"] == "ok"
        (medium,) = row["media"]
        assert medium["kind"] == "video"
        steps = [after - before for before, after in pairwise(medium["timestamps"])]
        assert all(0.8 <= step <= 1.25 for step in steps)  # fps: 1.0, to the nearest frame of the file

    @pytest.mark.slow
    def test_a_scale_laid_over_a_job_runs(self, tmp_path: Path, photos: Path) -> None:
        here = {
            "resources.gpus_per_engine": 0,
            "resources.engine_actors": 1,
            "resources.preprocess_actors": 1,
            "sampling.max_tokens": 4,
        }
        rows = run("configs/scale/7b-nodes.yaml", pictures(tmp_path / "photos", photos), tmp_path / "out", **here)
        assert [row["status"] for row in rows] == ["ok", "ok"]
        assert rows[0]["media"][0]["kind"] == "image"


def test_a_job_for_gpus_says_in_one_sentence_that_there_are_none(
    tmp_path: Path, photos: Path, ray_with_two_cpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = commands("configs/scale/2b-1gpu.yaml")[0]
    words += ["--input.path", str(pictures(tmp_path / "photos", photos)), "--output.path", str(tmp_path / "out")]
    assert caption.main([*words, "--model.path", "demo"]) != 0
    assert "the cluster has 0" in capsys.readouterr().err
