"""The config: every mistake at once, by full name; YAML and command line alike."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from jobs.command_line import parse_arguments
from jobs.evaluate import EvaluateConfig
from pipeline.config import CaptionConfig
from pipeline.config_file import fields_of, load_config
from pipeline.errors import ConfigError
from pipeline.planning.plan import PlanConfig

REQUIRED = {"input.path": "in", "model.path": "demo", "output.path": "out"}


def load(**overrides: str) -> CaptionConfig:
    return load_config(CaptionConfig, None, {**REQUIRED, **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: a}\nmodel: {path: demo}\noutput: {path: o}\nsampling: {max_tokens: 5, top_k: 3}\n")
    config = load_config(CaptionConfig, str(path), {"sampling.max_tokens": "9"})
    assert (config.sampling.max_tokens, config.sampling.top_k, config.input.path) == (9, 3, "a")


def test_each_config_is_laid_over_those_before_it(tmp_path: Path) -> None:
    job, scale = tmp_path / "job.yaml", tmp_path / "scale.yaml"
    job.write_text(
        "input: {path: a, keep: [x], columns: {image: url}}\nmodel: {path: demo}\noutput: {path: o}\n"
        "sampling: {max_tokens: 5, top_k: 3}\n"
    )
    scale.write_text("input: {keep: [y], columns: {video: clip}}\nsampling: {max_tokens: 7}\nprompt:\nmodel:\n")
    paths, overrides = parse_arguments(["--config", str(job), f"--config={scale}", "--output.path", "p"])
    config = load_config(CaptionConfig, paths, overrides)
    assert (config.sampling.max_tokens, config.sampling.top_k) == (7, 3)
    assert config.input.columns == {"image": "url", "video": "clip"}
    assert (config.input.path, config.input.keep) == ("a", {"y": "y"})
    assert (config.model.path, config.output.path) == ("demo", "p")


def test_a_mistake_in_several_configs_names_them_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("sampling: {max_tokens: many}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml \+ .*b\.yaml has 4 mistakes"):
        load_config(CaptionConfig, [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], {})


def test_a_mistake_inside_a_value_is_named_with_the_place_that_set_the_value(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("evaluate: {metrics: [rouge], tasks: {count: [vqa]}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(EvaluateConfig, str(path), {**REQUIRED, "evaluate.metrics": "exact"})
    found = str(caught.value).splitlines()
    assert [line.partition("; known")[0] for line in found] == [
        "the command line: evaluate.metrics.0: unknown metric exact",
        f"{path}: evaluate.tasks.count.0: unknown metric vqa",
    ]


def test_all_mistakes_are_reported_at_once_with_full_names() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            CaptionConfig,
            None,
            {"inptu.path": "x", "sampling.top_p": "3", "model.dtype": "int4", "input.keep": "text", "output.path": "o"},
        )
    message = str(caught.value)
    for expected in (
        "inptu.path: unknown key; did you mean input.path?",
        "sampling.top_p: found '3'",
        "model.dtype: found 'int4'; allowed: 'auto', 'bfloat16', 'float16' or 'float32'",
        "input.keep: text would collide",
        "input.path: missing",
        "model.path: missing",
        "6 mistakes",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("engine: {max_runing: 3}", "engine.max_runing: unknown key; did you mean engine.max_running?"),
        (
            "engine: {attention: fast}",
            "engine.attention: found 'fast'; allowed: 'auto', 'flash', 'torch', 'simd' or 'sdpa'",
        ),
        ("engine: {gpu_memory_fraction: 1.5}", "engine.gpu_memory_fraction: found 1.5; allowed: less than 1"),
        ('input: {csv: {delimiter: "\'", quote: "\'"}}', "input.csv: delimiter, quote and escape must be different"),
        ("input: {csv: {escape: ab}}", "input.csv.escape: found 'ab'"),
        ("input: {format: xml}", "input.format: found 'xml'; allowed: 'auto', 'parquet', 'jsonl', 'csv' or 'media'"),
        ("sampling: {seed: -1}", "sampling.seed: found -1; allowed: greater than or equal to 0"),
        ("sampling: {max_tokens: 5, min_tokens: 9}", "sampling: min_tokens is 9; allowed: 0 to max_tokens (5)"),
        ("sampling: {stop_strings: [a, '']}", "sampling: stop_strings is ['a', '']; allowed: a list of texts"),
    ],
)
def test_mistakes_in_the_engine_s_own_settings_are_reported_like_all_others(
    tmp_path: Path, yaml: str, expected: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, str(path), REQUIRED)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "output.path: it is empty"),
        ("s3://", "output.path: s3:// names no bucket"),
        ("gs:///captions", "output.path: gs:///captions names no bucket"),
    ],
)
def test_a_path_of_which_a_variable_was_unset_is_refused(path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, None, {**REQUIRED, "output.path": path})
    assert expected in str(caught.value)


@pytest.mark.parametrize("path", ["hdfs:///user/captions", "memory:///captions", "file:///captions"])
def test_file_systems_without_buckets_have_paths_of_three_slashes(path: str) -> None:
    assert load_config(CaptionConfig, None, {**REQUIRED, "output.path": path}).output.path == path


def test_a_config_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"job\.yaml is not UTF-8 text"):
        load_config(CaptionConfig, str(path), REQUIRED)


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("output: out/my", "output: found 'out/my'; allowed: keys below `output:`, such as `path`"),
        ("engine: [a]", "engine: found ['a']; allowed: keys below `engine:`, such as `kind`"),
        ("input: {path: in, csv: x}", "input.csv: found 'x'; allowed: keys below `csv:`, such as `delimiter`"),
        ("input: {keep: null}", "input.keep: found null; allowed: a list of columns, or names in the results mapped"),
        ("input: {columns: null}", "input.columns: found null; allowed: a mapping, as in {name: value}"),
        ("input: {allow: null}", "input.allow: found null; allowed: a list"),
        ("sampling: {stop_strings: null}", "sampling.stop_strings: found null; allowed: a list"),
        ("sampling: {stop_strings: 5}", "sampling.stop_strings.0: found 5; allowed: text, in quotes"),
        ("model: {revision: yes}", "model.revision: found true; allowed: text, in quotes"),
        ("input: {limit: many}", "input.limit: found 'many'; allowed: an integer"),
        ("input: {limit: 1.5}", "input.limit: found 1.5; allowed: an integer"),
        ("sampling: {temperature: hot}", "sampling.temperature: found 'hot'; allowed: a number"),
        ("sampling: {logprobs: maybe}", "sampling.logprobs: found 'maybe'; allowed: true or false"),
    ],
)
def test_a_value_of_a_wrong_type_is_told_in_words_of_yaml(tmp_path: Path, yaml: str, expected: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, str(path), {})
    assert expected in str(caught.value)


def test_one_item_alone_is_a_list_of_one_in_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        'sampling: {stop_strings: "\\n", stop_token_ids: 7}\ninput: {settings: fps, allow: /data, keep: url}\n'
    )
    config = load_config(CaptionConfig, str(path), REQUIRED)
    assert (config.sampling.stop_strings, config.sampling.stop_token_ids) == (("\n",), (7,))
    assert (config.input.settings, config.input.allow, config.input.keep) == (["fps"], ["/data"], {"url": "url"})


def test_every_config_key_that_the_code_names_exists() -> None:
    """Error messages tell users what to change; a key that is no key would send them nowhere."""
    keys = {name for config in (CaptionConfig, PlanConfig, EvaluateConfig) for name, _ in fields_of(config)}
    sections = "|".join({name.partition(".")[0] for name in keys})
    named = re.compile(rf"(?<![\w./-])(?:{sections})\.[a-z_][\w.]*\w")
    not_keys = re.compile(
        r"run\.json|engine\.(gpu|replaced)|model\.(files|adapter_files|thinks|family|generate|visual|language_model\b.*)"
    )
    root = Path(__file__).resolve().parents[2]
    unknown = []
    for path in (*root.glob("pipeline/**/*.py"), *root.glob("jobs/**/*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found = [name for name in named.findall(node.value) if not not_keys.fullmatch(name)]
                unknown += [f"{path.relative_to(root)}:{node.lineno} {name}" for name in found if name not in keys]
    assert not unknown, "\n".join(unknown)


def test_text_fields_take_the_word_as_it_stands() -> None:
    config = load(prompt__template="What: {name}? 5", input__path="123")
    assert config.prompt.template == "What: {name}? 5"
    assert config.input.path == "123"


@pytest.mark.parametrize("key", ["input.path", "model.path", "output.path"])
def test_a_uri_with_one_slash_is_no_local_path(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: s3:/b/x would be taken for .* a URI has two slashes: s3://b/x"):
        load(**{key: "s3:/b/x"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"input__keep": "[a, b]"}, {"a": "a", "b": "b"}),
        ({"input__keep": "a"}, {"a": "a"}),
        ({"input__keep": "{caption_old: text}"}, {"caption_old": "text"}),
        ({"input__keep": "[a]", "input__keep.caption_old": "text"}, {"a": "a", "caption_old": "text"}),
        ({"input__keep": "[a, a]"}, "a is named twice"),
        ({"input__keep": "[2024]"}, "found 2024; allowed: names of columns as text, in quotes"),
        ({"input__keep": "patches"}, "patches would collide .* as in {patches_old: patches}"),
        ({"input__keep.text": "caption"}, "text would collide"),
    ],
)
def test_kept_columns_are_one_mapping_however_they_are_written(
    overrides: dict[str, str], expected: dict[str, str] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            load(**overrides)
    else:
        assert load(**overrides).input.keep == expected


def test_lists_mappings_and_null_are_understood() -> None:
    config = load(input__settings="[fps, n]", input__columns='{"image": "url"}', media__max_visual_tokens="null")
    assert config.input.settings == ["fps", "n"]
    assert config.input.columns == {"image": "url"}
    assert config.media.max_visual_tokens is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (", ", (", ",)),
        ("\n", ("\n",)),
        ('"\\n"', ("\n",)),
        ("' '", (" ",)),
        ("[', ', END]", (", ", "END")),
        ("a,b", ("a,b",)),
        ("- x", ("- x",)),
    ],
)
def test_no_character_of_a_list_s_item_is_lost_on_the_command_line(text: str, expected: tuple[str, ...]) -> None:
    assert load(sampling__stop_strings=text).sampling.stop_strings == expected


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        ({"num_frames": "1"}, "media.num_frames: found '1'; allowed: greater than or equal to 2"),
        ({"min_pixels": "2000000", "max_pixels": "1000000"}, "min_pixels is 2000000 and max_pixels 1000000"),
        ({"video_min_pixels": "9", "video_max_pixels": "8"}, "video_min_pixels is 9 and video_max_pixels 8"),
        ({"min_frames": "9", "max_frames": "8"}, "min_frames is 9 and max_frames 8"),
    ],
)
def test_media_settings_that_no_row_could_use_are_refused(media: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**{f"media__{name}": value for name, value in media.items()})
    assert expected in str(caught.value)


def test_a_mistake_is_reported_where_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("sampling: {max_tokens: many}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, str(path), {**REQUIRED, "sampling.top_p": "high", "modle.path": "x"})
    by_place = dict(line.split(" has ", 1) for line in str(caught.value).splitlines() if " has " in line)
    assert by_place == {"the command line": "2 mistakes:"}
    assert f"{path}: sampling.max_tokens: found 'many'" in str(caught.value)


def test_one_column_can_be_mapped_on_the_command_line() -> None:
    config = load_config(CaptionConfig, None, {**REQUIRED, "input.columns.image": "url"})
    assert config.input.columns == {"image": "url"}
    with pytest.raises(ConfigError, match="picture is not a column that rows may have; allowed: id, system, messages"):
        load_config(CaptionConfig, None, {**REQUIRED, "input.columns.picture": "url"})


def test_the_config_is_frozen() -> None:
    config = load()
    with pytest.raises(Exception, match="frozen"):
        config.input.path = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sampling.max_tokens = 3  # type: ignore[misc]


def test_every_field_has_a_docstring() -> None:
    assert [name for name, field in fields_of(CaptionConfig) if not field.description] == []


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1,\n", "just text"])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(CaptionConfig, str(path), {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_may_be_joined_by_an_equals_sign_and_flags_have_short_forms() -> None:
    paths, overrides = parse_arguments(
        ["--config=a.yaml", "--sampling.seed=3", "--retry-failed=FetchError", "--verbose"]
    )
    assert paths == ["a.yaml"]
    assert overrides == {"sampling.seed": "3", "run.retry_failed": "FetchError", "run.verbose": "true"}


def retrying(asked: str) -> CaptionConfig:
    needed = {"input.path": "in", "output.path": "out", "model.path": "demo"}
    return load_config(CaptionConfig, None, {**needed, "run.retry_failed": asked})


def test_error_types_to_retry_may_have_blanks_and_stand_for_those_below_them() -> None:
    assert retrying("all").run.retried_types is None
    assert retrying("MediaTimeout , EngineCrash").run.retried_types == ["MediaTimeout", "EngineCrash"]
    below = {"FetchError", "MediaNotFound", "AccessDenied", "FetchTimeout", "MediaTooLarge"}
    assert set(retrying("FetchError").run.retried_types or ()) == below


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("FetchEror", "run.retry_failed: FetchEror is not a row error type; did you mean FetchError? known: all, Row"),
        ("FetchError, Media Timeout", "Media Timeout is not a row error type; did you mean MediaTimeout?"),
        ("ConfigError", "ConfigError is not a row error type"),
        (" , ", "is not a row error type"),
    ],
)
def test_an_error_type_that_no_row_can_have_is_refused(asked: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        retrying(asked)
    assert expected in str(caught.value)


@pytest.mark.parametrize("words", [["--sampling.seed"], ["stray"], ["--config"]])
def test_words_that_make_no_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_arguments(words)


def test_a_command_without_words_says_how_to_get_help(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.caption import main

    assert main([]) == 2
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == "`qwen2-vl-batch caption --help` lists every key; a first run: --config configs/caption.yaml"


def test_help_names_every_key_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.caption import main

    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, field in fields_of(CaptionConfig):
        assert f"--{name} (" in printed
        assert " ".join(field.description.split()) in printed
    assert "--sampling.logprobs (true | false; default false)" in printed
