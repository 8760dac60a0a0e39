"""The job's config: one frozen object that mirrors the YAML exactly, with a docstring under every field.

Knows names, types and limits; not what any of them does, nor how files and overrides are read (`config_file.py`).
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
    with_config,
)

from pipeline.config_values import Fraction, Location, NotNegative, Pool, Positive
from pipeline.engine import Dtype, EngineSettings, SamplingParams
from pipeline.errors import row_error_types
from pipeline.schema import MANIFEST_COLUMNS, MEDIUM_SETTING_COLUMNS, ROW_COLUMNS, SAMPLING_COLUMNS


def written(value: Any) -> str:
    """A setting's value for people, with null, true and false as YAML has them."""
    return "null" if value is None else repr(value).lower() if isinstance(value, bool) else repr(value)


class Section(BaseModel):
    """A part of the config: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


# The engine declares its own settings; as sections of the config they refuse unknown keys too.
ENGINE_SECTIONS = (EngineSettings, SamplingParams)
for _section in ENGINE_SECTIONS:
    with_config(ConfigDict(extra="forbid"))(_section)


class CsvConfig(Section):
    """How CSV files are written."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character between fields. Default: what a first line such as Excel's `sep=;` names; a tab in .tsv; else the one
    of `,`, `;`, tab and `|` that the header has most of."""
    quote: Annotated[str, Field(max_length=1)] = '"'
    """Character around fields that hold delimiters or line breaks; empty where no character does."""
    escape: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character before a quote inside a quoted field, such as a backslash. Default: the quote is written twice."""

    @model_validator(mode="after")
    def _characters_differ(self) -> CsvConfig:
        used = [character for character in (self.delimiter, self.quote, self.escape) if character]
        if len(set(used)) < len(used) or not set(used).isdisjoint("\r\n"):
            raise ValueError("delimiter, quote and escape must be different characters, and no line breaks")
        return self


def _kept_columns(value: Any) -> Any:
    """The mapping that `input.keep` stands for: names in the results to the manifest's."""
    names = [value] if isinstance(value, str) else value
    if isinstance(value, dict):
        return value
    if not isinstance(names, list):
        raise ValueError(
            f"found {written(value)}; allowed: a list of columns, or names in the results mapped to columns, as in "
            "{caption_old: text}"
        )
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"found {written(odd[0])}; allowed: names of columns as text, in quotes where they are numbers"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is named twice")
    return {name: name for name in names}


class InputConfig(Section):
    """The manifest, and what its rows may reach."""

    path: Location
    """Manifest: a Parquet, JSONL or CSV file, a folder or glob of them, or a folder or bucket prefix of media."""
    format: Literal["auto", "parquet", "jsonl", "csv", "media"] = "auto"
    """What the manifest is; `auto` goes by file names."""
    csv: CsvConfig = CsvConfig()
    """How CSV files are written."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column names mapped to the manifest's, as in `image: url`."""
    settings: list[str] = Field(default_factory=list)
    """Settings of sampling and media that rows set for themselves in a column of the same name, as in
    `[max_tokens, fps]`. A column of another name is mapped in `columns`."""
    allow_missing_media: bool = False
    """Whether a row with nothing in the manifest's media columns is asked without media. Otherwise it is a
    `MediaMissing` error."""
    keep: Annotated[dict[str, str], BeforeValidator(_kept_columns)] = Field(default_factory=dict)
    """Manifest columns to copy into the results: a list as in `[source, license]`, or names in the results mapped to
    the manifest's, as in `{caption_old: text}`."""
    limit: Positive | None = None
    """Take only this many rows from the start of the manifest."""
    allow: list[str] = Field(default_factory=list)
    """Further folders, buckets and hosts that rows may name. Always allowed: the manifest's own folder or bucket,
    and public http(s) hosts. `*` allows every folder, bucket and public host. The environment's web proxy is used if it
    is named here."""
    allow_private_hosts: bool = False
    """Whether http(s) URLs may lead to private networks and this machine."""
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Time limit in seconds for one attempt to fetch a medium from a bucket or URL; then it is tried again. Local files
    have no limit."""
    fetch_retries: NotNegative = 3
    """How often a transient fetch error is tried again, with growing pauses."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options for the bucket's file system (fsspec), such as `endpoint_url` or `profile`."""

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(columns) - set(MANIFEST_COLUMNS))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is not a column that rows may have; allowed: {', '.join(MANIFEST_COLUMNS)}"
            )
        return columns

    @field_validator("settings")
    @classmethod
    def _settings_are_known(cls, settings: list[str]) -> list[str]:
        allowed = (*MEDIUM_SETTING_COLUMNS, *SAMPLING_COLUMNS)
        if unknown := [name for name in settings if name not in allowed]:
            raise ValueError(f"{', '.join(unknown)} is not a setting that rows may have; allowed: {', '.join(allowed)}")
        return settings

    @field_validator("keep")
    @classmethod
    def _kept_names_are_free(cls, keep: dict[str, str]) -> dict[str, str]:
        if taken := sorted(set(keep) & set(ROW_COLUMNS)):
            raise ValueError(
                f"{', '.join(taken)} would collide with the pipeline's own column of that name; "
                f"keep it under another name, as in {{{taken[0]}_old: {keep[taken[0]]}}}"
            )
        return keep


class PromptConfig(Section):
    """What is asked of rows that bring no messages of their own."""

    template: str | None = None
    """The user's text: a format string over the manifest's columns, as in `Describe this {category} photo.`"""
    system: str | None = None
    """System prompt for rows without one; without it the chat template's own is used."""
    add_vision_id: bool = False
    """Whether media are announced as `Picture 1: `, `Video 1: `, so that the text can name them."""
    thinking: bool = False
    """Whether a model that can think before it answers does so. Checkpoints that always think are not changed."""
    allow_tokens: list[str] = Field(default_factory=list)
    """Tags such as `<think>` that texts may write although they are tokens of the checkpoint. Otherwise a row whose
    text writes one is an error row."""


class MediaConfig(Section):
    """How media are decoded and resized. A row's own settings win."""

    resize: Literal["torch", "pil"] = "torch"
    """Whose bicubic: `torch` equals transformers' torchvision processor bit for bit, `pil` its PIL processor."""
    min_pixels: Positive | None = None
    """Least area of an image in pixels after resizing. Default: the checkpoint's."""
    max_pixels: Positive | None = None
    """Largest area of an image in pixels after resizing. Default: the checkpoint's."""
    video_min_pixels: Positive | None = None
    """Least area of a video frame in pixels. Default: the checkpoint's, or 128 x 28 x 28; Qwen3-VL has none."""
    video_max_pixels: Positive | None = None
    """Largest area of a video frame in pixels. Default: the checkpoint's, or 768 x 28 x 28; Qwen3-VL has none."""
    video_total_pixels: Positive | None = None
    """Largest area of all of a video's frames together, counted as transformers counts it for the model: of Qwen2-VL
    and Qwen2.5-VL the pixels of frame pairs (default 90,316,800), of Qwen3-VL the pixels of all frames (default: the
    checkpoint's, or 25,165,824)."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames a second to sample from a video."""
    num_frames: Annotated[int, Field(ge=2)] | None = None
    """Frames to sample from every video, in place of `fps`."""
    min_frames: Positive = 4
    """Fewest frames to sample by `fps`."""
    max_frames: Positive = 768
    """Most frames to sample by `fps`."""
    video_frames: Literal["exact", "keyframes"] = "exact"
    """`exact`: just the frames that the rule names. `keyframes`: the nearest keyframes, far cheaper; the receipt
    tells which."""
    frame_sampling: Literal["transformers", "qwen"] = "transformers"
    """Whose rule chooses frames: `transformers` divides the video evenly and shows the frame at each part's start (for
    Qwen3-VL it spreads them from the first frame to the last), `qwen` (qwen-vl-utils) spreads an even number of them
    from the first frame to the last. The receipt notes `qwen`."""
    truncated_images: Literal["error", "accept"] = "error"
    """What becomes of an image that ends too early: an error row, or what is there, with a note in the receipt."""
    max_visual_tokens: Positive | None = None
    """Most visual tokens for all of a row's media together; they are shrunk to fit, and the receipt says so."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that decoding one medium may take before it is killed."""
    memory_limit_mb: Positive = 4096
    """Memory that the decoder's process may use before it is killed."""
    max_bytes: Positive = 2 * 1024**3
    """Largest encoded medium, in bytes."""
    max_image_pixels: Positive = 178_956_970
    """Largest decoded image or frame, in pixels; above it a medium counts as a decompression bomb."""
    max_video_s: Annotated[float, Field(gt=0)] = 6 * 3600.0
    """Longest video, in seconds."""
    max_video_frames: Positive = 1_000_000
    """Most frames that a video may have in its file."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("min_frames", "max_frames"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} is {least} and {high} {most}; the first must not be larger")
        return self


class ModelConfig(Section):
    """The checkpoint and how it is run."""

    path: Location
    """`demo`, a folder with a Qwen-VL checkpoint, a hub name such as `Qwen/Qwen2-VL-2B-Instruct`, or a bucket prefix
    such as `s3://bucket/checkpoints/qwen2-vl-7b`."""
    cache_dir: str | None = None
    """Where each machine keeps checkpoints from buckets, downloaded once by whichever actor comes first. Default:
    ~/.cache/qwen2-vl-batch. Hub names have the hub's own cache (HF_HOME)."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options for the bucket of checkpoint and adapter (fsspec)."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    adapter: str | None = None
    """A LoRA in PEFT's form (`adapter_config.json`, `adapter_model.safetensors`) that is merged into the checkpoint
    while it loads: a folder, a hub name or a bucket prefix. Tokenizer and chat template are the checkpoint's."""
    adapter_revision: str | None = None
    """Branch, tag or commit of a hub adapter."""
    dtype: Dtype = "auto"
    """`auto` is the checkpoint's own where the device computes it natively (bfloat16: GPUs from compute capability 8.0,
    CPUs with such instructions), else float16 on a GPU and float32 on a CPU. A run is continued in the dtype in which
    it began."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where the engine's actor has one."""


class OutputConfig(Section):
    """The run folder."""

    path: Location
    """Folder on disk or prefix in a bucket. The same command on the same folder resumes."""
    rows_per_fragment: Positive = 10_000
    """Finished rows that may wait before they are published: the most that a crash can cost. Large rows are published
    at 256 MB."""
    seconds_per_fragment: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that finished rows may wait before they are published."""
    rows_per_part: Positive = 100_000
    """Rows in each final part file; a part of large rows ends at about 256 MB in memory."""
    partition_by: str | None = None
    """A kept column by whose values the part files are put into folders, as in `task=count/part-00000.parquet`: text,
    numbers, booleans, dates or times. A value too long for a folder's name is cut there, not in the rows."""
    report: bool = True
    """Whether to write `_report.html`, one page about the run, at its end."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options for the bucket's file system (fsspec)."""


class ResourcesConfig(Section):
    """Ray's share: actors and what each reserves."""

    address: str | None = None
    """Ray cluster to join: `auto` or `host:port`; `local` starts one for this job. Default: what RAY_ADDRESS
    says; else the Ray that runs on this machine, or a new local one."""
    num_cpus: Positive | None = None
    """CPUs for a Ray that this job starts, even if one runs on this machine already. Ignored when joining a cluster.
    Default: this machine's."""
    preprocess_actors: Pool = None
    """CPU actors that fetch, decode and patchify: a number, or fewest and most as in `2,16`, for a pool that grows
    and shrinks with the work and the cluster. Default: from the cluster's CPUs."""
    preprocess_cpus: Annotated[float, Field(gt=0)] | None = None
    """CPUs that each of them reserves; each uses one thread."""
    engine_actors: Pool = None
    """Engine actors: a number, or fewest and most as in `1,8`. Default: one for each GPU, or one."""
    engine_cpus: Annotated[float, Field(gt=0)] | None = None
    """CPUs reserved for each engine actor. Default: one beside a GPU, or half of the node's for an engine on the CPU;
    less where a node has few."""
    gpus_per_engine: Annotated[float, Field(ge=0)] | None = None
    """GPUs that each engine actor reserves, all on one node. Default: one where the cluster has any."""
    block_mb: Annotated[float, Field(gt=0)] = 128.0
    """Patches in one table between preprocessing and the engine, in MB. Each table costs Ray some 20 ms: on two cores
    preprocessing reaches a quarter of its speed with 8, and four fifths with 128."""
    blocks_in_flight: Positive | None = None
    """Tables inside each engine actor at once. Default: 16 for an engine on the CPU and 64 for one on a GPU, or fewer
    where they would fill more than a quarter of the node's object store."""
    min_rows_per_unit: Positive = 8
    """Rows of the manifest read by one task at the end of the job, when units are smallest."""
    max_rows_per_unit: Positive = 256
    """Rows read by one task while there is much to do (a job of over 2 million rows takes more), and most rows in one
    table between the stages."""


class RunConfig(Section):
    """The conduct of the run."""

    max_error_fraction: Fraction | None = None
    """Share of error rows above which the job stops (looked at after the first 100 rows, and at the end). Default: a
    job stops where nearly all (95 %) of the first 200 rows or more fail; 1 never stops it."""
    on_change: Literal["error", "new-rows"] = "error"
    """`error` refuses a changed manifest. `new-rows` also processes files or media that were added. A larger
    `input.limit` just goes on; other changed settings are always refused."""
    retry_failed: str | None = None
    """Run error rows again: `all`, or error types separated by commas; a type stands for those below it too."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds after which an actor that has rows and makes no progress is killed, and its rows run again, alone; and
    after which the job prints what every actor is doing when no row finishes at all."""
    node_loss_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a finished row, after a node of the cluster was lost, that Ray has to recover by itself; then
    the command starts again, and resumes on the nodes that are left."""
    max_flow_restarts: NotNegative = 3
    """Consecutive restarts after lost nodes that may pass without a finished row."""
    profile_steps: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Write a torch trace of so many engine steps, and Ray's timeline, into `__run/profile/` in the run folder."""
    verbose: bool = False
    """Whether Ray's own messages are shown, in place of going to `__run/log.txt` in the run folder."""

    @field_validator("retry_failed")
    @classmethod
    def _error_types_are_known(cls, asked: str | None) -> str | None:
        known = row_error_types()
        names = _names_in(asked)
        unknown = [name for name in names if name not in known]
        if asked is not None and asked != "all" and (unknown or not names):
            close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.6) if unknown else []
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{', '.join(unknown) or repr(asked)} is not a row error type; {hint}known: all, {', '.join(known)}"
            )
        return asked

    @property
    def retried_types(self) -> list[str] | None:
        """Error types to run again, with those below the ones that were named; None for all."""
        if self.retry_failed == "all":
            return None
        known = row_error_types()
        return list(
            dict.fromkeys(kind for name in _names_in(self.retry_failed) for kind in row_error_types(known[name]))
        )


def _names_in(asked: str | None) -> list[str]:
    """The comma-separated names in `run.retry_failed`."""
    return [name.strip() for name in (asked or "").split(",") if name.strip()]


class CaptionConfig(Section):
    """Everything the caption job needs to know."""

    input: InputConfig
    prompt: PromptConfig = PromptConfig()
    media: MediaConfig = MediaConfig()
    model: ModelConfig
    engine: EngineSettings = EngineSettings()
    sampling: SamplingParams = SamplingParams()
    output: OutputConfig
    resources: ResourcesConfig = ResourcesConfig()
    run: RunConfig = RunConfig()

    def keeper(self, name: str) -> str:
        """The setting that asks for this column of the results."""
        return "input.keep"
