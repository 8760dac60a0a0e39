"""What run.json and progress.jsonl record, as text and numbers for a page: what ran, how fast, at what cost.

Every key is optional: a run that stopped early gives fewer lines, not an error. Secrets in settings are hidden, since
a report is made to be passed on. Knows dictionaries; not files or pages.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.families import FAMILIES
from pipeline.errors import counted
from pipeline.manifest.files import MEDIA
from pipeline.planning.roofline import PATCHES_PER_TOKEN, find_gpu, named_shape

_SECRET = re.compile(r"secret|password|passwd|api_?key|access_?key|credential|auth|private_?key|^token$|_token$", re.I)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_HARMLESS_STORAGE = {"endpoint_url", "region", "region_name", "profile", "anon", "project", "use_ssl"}
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class StageTime:
    """How busy the actors of one stage were."""

    name: str
    num_actors: int
    busy_s: float
    """Summed over the actors."""
    busy_share: float | None


@dataclass(frozen=True)
class Speed:
    """How fast a folder's runs were, and what they took, as far as they recorded that.

    A folder that was resumed has several runs. Those of versions that kept no totals are left out, but for the last.
    """

    num_runs: float
    """Runs that the figures are of."""
    of_runs: float
    """Runs that there were."""
    num_rows: float | None
    """Rows that they ran, those that ran again included."""
    rows_per_s: float | None
    output_tokens_per_s: float | None
    seconds: float | None
    last_rows: float | None
    """Rows of the last run alone."""
    last_rows_per_s: float | None
    last_seconds: float | None
    num_gpus: float
    gpu_name: str | None
    mfu: float | None
    """Model FLOP utilisation, from 0 to 1."""
    mfu_basis: str | None
    gpu_hours: float | None
    cost: float | None
    stages: tuple[StageTime, ...]
    """Of the last run, as is the bottleneck."""
    bottleneck: str | None

    @property
    def covered(self) -> str | None:
        """Which runs the figures are of, where there was more than one."""
        if self.of_runs <= 1:
            return None
        if self.num_runs >= self.of_runs:
            return f"{self.of_runs:,.0f} runs"
        return f"the last {'' if self.num_runs <= 1 else f'{self.num_runs:,.0f} '}of {self.of_runs:,.0f} runs"


def at(values: Any, path: str) -> Any:
    """The value under a dotted path of nested mappings; None where a step is missing."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def text_at(values: Any, path: str) -> str | None:
    """The same where it is text that is not empty."""
    value = at(values, path)
    return value if isinstance(value, str) and value else None


def number_at(values: Any, path: str) -> float | None:
    """The same where it is a number."""
    value = at(values, path)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def items_at(values: Any, path: str) -> list[Any]:
    """The same where it is a list; an empty one elsewhere."""
    value = at(values, path)
    return value if isinstance(value, list) else []


def speed(run: Mapping[str, Any], *, price_per_gpu_hour: float | None = None) -> Speed:
    """Speed, utilisation, MFU and cost."""
    num_gpus, last_rows = _num_gpus(run), number_at(run, "counts.this_run")
    last_seconds, last_rows_per_s = (number_at(run, f"throughput.{name}") for name in ("seconds", "rows_per_s"))
    num_runs = number_at(run, "totals.runs")
    if num_runs:
        part = "totals"
        seconds, num_rows, gpu_seconds, row_seconds, tokens = (
            number_at(run, f"totals.{name}")
            for name in ("seconds", "rows", "gpu_seconds", "row_seconds", "output_tokens")
        )
        rows_per_s, tokens_per_s = (
            count / row_seconds if count is not None and row_seconds else None for count in (num_rows, tokens)
        )
    else:
        part, seconds, num_rows, rows_per_s = "throughput", last_seconds, last_rows, last_rows_per_s
        tokens_per_s = number_at(run, "throughput.output_tokens_per_s")
        gpu_seconds = num_gpus * (seconds or 0.0)
    gpu_hours = gpu_seconds / 3600 if gpu_seconds else None
    mfu, mfu_basis = _mfu(run, part, gpu_seconds)
    return Speed(
        num_runs=num_runs or 1,
        of_runs=number_at(run, "num_runs") or 1,
        num_rows=num_rows,
        rows_per_s=rows_per_s,
        output_tokens_per_s=tokens_per_s,
        seconds=seconds,
        last_rows=last_rows,
        last_rows_per_s=last_rows_per_s,
        last_seconds=last_seconds,
        num_gpus=num_gpus,
        gpu_name=text_at(run, "engine.gpu"),
        mfu=mfu,
        mfu_basis=mfu_basis,
        gpu_hours=gpu_hours,
        cost=gpu_hours * price_per_gpu_hour if gpu_hours and price_per_gpu_hour else None,
        stages=tuple(_stages(run, last_seconds)),
        bottleneck=text_at(run, "bottleneck"),
    )


def _num_gpus(run: Mapping[str, Any]) -> float:
    engines, each = (number_at(run, f"placement.{name}") for name in ("engine_actors", "gpus_per_engine"))
    return (engines or 0.0) * (each or 0.0)


def _mfu(run: Mapping[str, Any], part: str, gpu_seconds: float | None) -> tuple[float | None, str | None]:
    """Model FLOP utilisation and how it was computed: 2 FLOP a parameter and token, attention left out. `part` of the
    record has the tokens."""
    gpu = find_gpu(text_at(run, "engine.gpu") or "")
    shape = named_shape(str(at(run, "model.path")))
    prompt, output, visual = (number_at(run, f"{part}.{kind}_tokens") for kind in ("prompt", "output", "visual"))
    if gpu is None or shape is None or not gpu_seconds or prompt is None or output is None:
        return None, None
    vision = PATCHES_PER_TOKEN * shape.vision_body + shape.merger
    flops = 2 * (shape.body + shape.head) * (prompt + output) + 2 * vision * (visual or 0.0)
    basis = f"2 FLOP a parameter and token without attention, over {gpu.flops / 1e12:,.0f} TFLOP/s dense bfloat16 a GPU"
    return flops / (gpu.flops * gpu_seconds), basis


def _stages(run: Mapping[str, Any], seconds: float | None) -> Iterator[StageTime]:
    """Each stage once, the times of its actors added up."""
    actors = [(text_at(actor, "kind"), actor) for actor in items_at(run, "stages")]
    for name in dict.fromkeys(name for name, _ in actors if name):
        mine = [actor for kind, actor in actors if kind == name]
        busy = sum(number_at(actor, "busy_s") or 0.0 for actor in mine)
        idle = [number_at(actor, "idle_s") for actor in mine]
        total = (seconds or 0.0) * len(mine) if None in idle else busy + sum(value or 0.0 for value in idle)
        yield StageTime(name, len(mine), busy, min(busy / total, 1.0) if total > 0 else None)


def rates_over_time(progress: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The rates that a page draws, by their title."""
    named = {"rows": "Rows per second", "output_tokens": "Output tokens per second", "errors": "Errors per second"}
    found = {title: rates(progress, name) for name, title in named.items()}
    if not any(rate for _, rate in found["Errors per second"]):
        del found["Errors per second"]
    return {title: points for title, points in found.items() if len(points) >= 2}


def rates(progress: Sequence[Mapping[str, Any]], name: str, max_points: int = 120) -> list[tuple[float, float]]:
    """(seconds, per second) of a growing count, about `max_points` of them; empty where it was not recorded."""
    known = [(float(line["t"]), count) for line in progress if (count := number_at(line, name)) is not None]
    if len(known) < 3:
        return []
    start, last = known[0][0], known[-1]
    chosen = known[:: -(-len(known) // max_points)]
    if chosen[-1] != last:
        chosen.append(last)
    return [
        (t - start, max((value - before) / (t - earlier), 0.0))
        for (earlier, before), (t, value) in itertools.pairwise(chosen)
        if t > earlier
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Settings and sources, without secrets


def settings_lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its full name, secrets hidden."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from settings_lines(value, f"{name}.")
        elif _is_secret(name) and value not in (None, "", {}, []):
            yield name, HIDDEN
        else:
            yield name, _setting(value)


def _is_secret(name: str) -> bool:
    *sections, key = name.split(".")
    if any(section.endswith("storage_options") for section in sections):
        return key not in _HARMLESS_STORAGE
    return _SECRET.search(key) is not None


def _setting(value: Any) -> str:
    if value is None or isinstance(value, Mapping):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value) or "none"
    return shown_source(str(value))


def setting_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, baseline, this run) of the settings that differ and that may change answers or speed."""
    mine, other = dict(settings_lines(ours)), dict(settings_lines(theirs))
    return [
        (name, other.get(name, "not set"), mine.get(name, "not set"))
        for name in dict.fromkeys([*other, *mine])
        if mine.get(name) != other.get(name) and not name.startswith(("output.", "evaluate.", "run."))
    ]


def shown_source(source: str) -> str:
    """A source fit to be passed on: data: URLs cut short, passwords and signatures of URLs removed."""
    if source.startswith("data:"):
        return source.partition(",")[0][:60] + ",…"
    scheme, separator, rest = source.partition("://")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        host, slash, path = rest.partition("/")
        path, question, _ = path.partition("?")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" + ("?…" if question else "")
    return source


def without_secrets(text: str) -> str:
    """A message whose URLs have lost their passwords and signatures."""
    return _URL.sub(lambda match: shown_source(match[0]), text)


# ---------------------------------------------------------------------------------------------------------------------
# What ran


def headline(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran: model, prompt, sampling, data, code, hardware."""
    attention, revision = text_at(run, "engine.attention"), text_at(run, "model.revision")
    adapter, adapter_revision = text_at(run, "model.adapter"), text_at(run, "model.adapter_revision")
    family = FAMILIES.get(text_at(run, "model.family") or "")
    kernels, replaced = text_at(run, "engine.kernels"), at(run, "engine.replaced")
    commit, version = text_at(run, "versions.commit"), text_at(run, "versions.qwen2-vl-batch")
    cpus = number_at(run, "hardware.cpus")
    num_gpus = _num_gpus(run)
    packages = [(name, text_at(run, f"versions.{name}")) for name in ("torch", "transformers", "ray")]
    lines: list[tuple[str, str | None]] = [
        (
            "Model",
            _joined(
                text_at(run, "model.path"),
                family.title if family else None,
                revision and f"revision {revision}",
                "thinks before it answers" if at(run, "model.thinks") else None,
            ),
        ),
        ("Adapter", _joined(adapter, adapter_revision and f"revision {adapter_revision}") if adapter else None),
        (
            "Engine",
            _joined(
                *(text_at(run, f"engine.{name}") for name in ("kind", "dtype", "device")),
                attention and f"{attention} attention",
                kernels and f"{kernels} kernels",
                "CUDA graphs" if at(run, "engine.cuda_graphs") else None,
            ),
        ),
        (
            "Not used",
            "; ".join(f"{part}: {reason}" for part, reason in replaced.items())
            if isinstance(replaced, Mapping)
            else None,
        ),
        (
            "Prompt",
            text_at(run, "config.prompt.template") or ("from the manifest's rows" if at(run, "config") else None),
        ),
        ("System prompt", text_at(run, "config.prompt.system")),
        ("Sampling", _sampling(at(run, "config.sampling"))),
        ("Data", _data(run)),
        ("Beside the data", _joined(*(note for note in items_at(run, "manifest.notes") if isinstance(note, str)))),
        ("Code", _joined(version and f"qwen2-vl-batch {version}", commit and _commit(commit))),
        ("Packages", _joined(*(f"{name} {version}" for name, version in packages if version))),
        (
            "Hardware",
            _joined(
                f"{num_gpus:g} x {text_at(run, 'engine.gpu') or 'GPU'}" if num_gpus else None,
                cpus and f"{cpus:g} CPUs",
                text_at(run, "hardware.processor"),
                text_at(run, "hardware.system"),
            ),
        ),
        ("Started", _moment(text_at(run, "started"))),
    ]
    return [(name, text) for name, text in lines if text]


def _joined(*parts: str | float | None) -> str | None:
    return ", ".join(str(part) for part in parts if part) or None


def _commit(commit: str) -> str:
    commit, _, changed = commit.partition("-")
    return f"commit {commit[:12]}" + (" with changes" if changed else "")


def _sampling(sampling: Any) -> str | None:
    if not isinstance(sampling, Mapping) or not sampling:
        return None
    temperature = number_at(sampling, "temperature")
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature else {}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    defaults = {**filters, **penalties, "n": 1}
    return _joined(
        f"temperature {temperature:g}" if temperature else "greedy",
        *(f"{n} {sampling[n]}" for n, off in defaults.items() if sampling.get(n, off) != off),
        f"at most {sampling.get('max_tokens')} tokens",
        None if sampling.get("seed") is None else f"seed {sampling['seed']}",
    )


def _data(run: Mapping[str, Any]) -> str | None:
    path = text_at(run, "manifest.path") or text_at(run, "config.input.path")
    files, num_rows = items_at(run, "manifest.fingerprint.files"), number_at(run, "manifest.fingerprint.num_rows")
    size = sum(file[1] for file in files if isinstance(file, list) and len(file) > 1 and isinstance(file[1], int))
    of_media = at(run, "manifest.fingerprint.format") == MEDIA  # then the files are listings of the folder
    if num_rows is None:
        rows = None
    elif of_media:
        rows = counted(num_rows, "file")
    else:
        rows = f"{counted(num_rows, 'row')} in {counted(len(files), 'file')}"
    return _joined(
        path and shown_source(path),
        rows,
        f"{size:,.0f} bytes" if size and not of_media else None,
    )


def _moment(value: str | None) -> str | None:
    try:
        return datetime.datetime.fromisoformat(value or "").strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return None
