"""From the config to the stages: kept columns, and which files are the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.conversation import Text
from pipeline.errors import CheckpointError, ConfigError, OutputError
from pipeline.execution.stages import kept_schema, open_stages
from pipeline.manifest.work import read_work
from pipeline.preprocess.messages.row import conversation
from pipeline.preprocess.messages.values import manifest_rows
from pipeline.results.run_record import check_unchanged, identity


def config_of(folder: Path, **overrides: str) -> CaptionConfig:
    values = {"input.path": str(folder), "model.path": "demo", "output.path": str(folder / "out")}
    return load_config(CaptionConfig, None, values | {key.replace("__", "."): text for key, text in overrides.items()})


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"prompt": ["a?", "b?"], "text": ["A", "B"]}), tmp_path / "rows.parquet")
    return tmp_path


def test_a_manifest_s_column_text_is_kept_under_another_name(captions: Path) -> None:
    config = config_of(captions, input__keep="{caption_old: text, prompt: prompt}", output__partition_by="caption_old")
    opened = open_stages(config)
    assert kept_schema(config, opened.manifest).names == ["caption_old", "prompt"]
    assert opened.stages.columns == ("prompt", "text")
    assert opened.stages.preprocess.kept_from == {"caption_old": "text", "prompt": "prompt"}


def test_kept_columns_that_the_manifest_lacks_are_named_with_how_to_keep_none(captions: Path) -> None:
    with pytest.raises(ConfigError, match=r"input\.keep: the manifest has no column 'task', 'x'; .* none as \[\]"):
        open_stages(config_of(captions, input__keep="[task, x]"))
    open_stages(config_of(captions, input__keep="[]"))


def test_a_column_in_the_name_of_a_folder_is_kept_asked_and_partitioned_by_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "year=2024" / "rows.parquet")
    config = config_of(
        tmp_path, input__keep="[year]", output__partition_by="year", prompt__template="A photo of {year}. What is it?"
    )
    opened = open_stages(config)
    (unit,) = opened.whole_manifest()
    (row,) = manifest_rows(read_work(opened.manifest.spec, unit, opened.stages.columns))
    assert row["year"] == 2024 and kept_schema(config, opened.manifest) == pa.schema([("year", pa.int64())])
    (message,) = conversation(row, opened.stages.preprocess.messages).messages
    assert message.parts[-1] == Text("A photo of 2024. What is it?")


@pytest.mark.parametrize(
    ("columns", "overrides", "kind"),
    [
        ("file,license", {}, "media"),
        ("image,license", {}, "csv"),
        ("file,license", {"input__columns.image": "file"}, "csv"),
        ("file,license", {"prompt__template": "What is {file}?"}, "csv"),
    ],
)
def test_a_table_beside_photos_is_the_manifest_where_the_config_or_its_columns_say_so(
    columns: str, overrides: dict[str, str], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "license.csv").write_text(f"{columns}\na.jpg,CC0\n")
    assert open_stages(config_of(tmp_path, **overrides)).manifest.format == kind


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"input__keep": "{caption_old: txet}"}, "no column 'txet'; found: prompt, text"),
        ({"input__keep": "{caption_old: text}", "output__partition_by": "text"}, "text is not a kept column"),
    ],
)
def test_columns_that_can_not_be_kept_are_refused(captions: Path, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_stages(config_of(captions, **overrides))


def test_a_folder_of_photos_without_the_column_that_names_its_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"year is not a kept column; input\.keep: none"):
        open_stages(config_of(tmp_path, input__keep="[year]", output__partition_by="year"))


def test_a_run_goes_on_with_the_columns_that_it_kept_and_no_others(captions: Path) -> None:
    def record(keep: Any) -> dict[str, Any]:
        return {
            "identity": {**identity(config, "demo-model"), "input.keep": keep},
            "manifest": {"fingerprint": manifest.fingerprint()},
        }

    config = config_of(captions, input__keep="[prompt]")
    manifest = open_stages(config).manifest
    asked = identity(config, "demo-model")
    assert check_unchanged(record(["prompt"]), config, asked, manifest, folder="out").num_rows == 2
    with pytest.raises(OutputError, match=r"input\.keep: was \[{'prompt': 'text'}\], is \['prompt'\]"):
        check_unchanged(record([{"prompt": "text"}]), config, asked, manifest, folder="out")


def test_a_run_is_refused_with_another_adapter_or_a_changed_one(captions: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    config = config_of(captions / "rows.parquet", model__adapter=str(adapter))
    opened = open_stages(config)
    assert opened.stages.generate.engine.adapter == str(adapter)
    asked = identity(config, "demo-model")
    plain = identity(config_of(captions), "demo-model")
    older = {name: value for name, value in plain.items() if "adapter" not in name}

    def check(before: dict[str, Any]) -> None:
        record = {"identity": before, "manifest": {"fingerprint": opened.manifest.fingerprint()}}
        check_unchanged(record, config, identity(config, "demo-model"), opened.manifest, folder="out")

    check(asked)
    for before in (plain, older):
        with pytest.raises(OutputError, match=r"model\.adapter: was null, is "):
            check(before)
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    with pytest.raises(OutputError, match=r"lora: adapter_model\.safetensors: was 7 bytes"):
        check(asked)
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(CheckpointError, match="only LORA can be merged"):
        open_stages(config)
