"""What run.json and progress.jsonl say, in words and numbers for a page: what ran, how fast, at what cost.

Every key is optional: a run that broke off, or one of an older version, gives fewer lines, not an error. Secrets in
settings are blacked out, for a report is made to be sent on. Knows dictionaries; not files or pages.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.planning.roofline import find_gpu

_SECRET = re.compile(r"secret|password|passwd|api_?key|access_?key|credential|auth|private_?key|^token$|_token$", re.I)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_HARMLESS_STORAGE = {"endpoint_url", "region", "region_name", "profile", "anon", "project", "use_ssl"}
HIDDEN = "(hidden)"

# Parameters of the language model and of the vision tower, which sees four patches for each visual token.
_QWEN2_VL_SIZES = {"2b": (1.54e9, 0.665e9), "7b": (7.62e9, 0.675e9), "72b": (72.7e9, 0.675e9)}


@dataclass(frozen=True)
class Speed:
    """How fast the run was, as far as it recorded that."""

    rows_per_s: float | None = None
    output_tokens_per_s: float | None = None
    seconds: float | None = None
    num_gpus: float = 0
    gpu_name: str | None = None
    mfu: float | None = None
    mfu_basis: str | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    stages: tuple[tuple[str, int, float, float | None], ...] = ()
    """Name, workers, busy seconds, and share of the time busy."""
    bottleneck: str | None = None


def number(value: Any) -> float | None:
    """The value as a number; None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def speed(run: Mapping[str, Any], *, price_per_gpu_hour: float | None = None) -> Speed:
    """Speed, utilisation, MFU and cost."""
    throughput = _mapping(run.get("throughput"))
    seconds = number(throughput.get("seconds")) or _wall_seconds(run)
    num_gpus, gpu_name = _gpus(run)
    gpu_hours = num_gpus * seconds / 3600 if num_gpus and seconds else None
    mfu, basis = _mfu(run, throughput, seconds, num_gpus, gpu_name)
    stages = tuple(_stages(run, seconds))
    return Speed(
        rows_per_s=number(throughput.get("rows_per_s")),
        output_tokens_per_s=number(throughput.get("output_tokens_per_s")),
        seconds=seconds,
        num_gpus=num_gpus,
        gpu_name=gpu_name,
        mfu=mfu,
        mfu_basis=basis,
        gpu_hours=gpu_hours,
        cost=gpu_hours * price_per_gpu_hour if gpu_hours and price_per_gpu_hour else None,
        stages=stages,
        bottleneck=run["bottleneck"] if isinstance(run.get("bottleneck"), str) else _bottleneck(stages),
    )


def _wall_seconds(run: Mapping[str, Any]) -> float | None:
    try:
        started, finished = (datetime.datetime.fromisoformat(str(run[key])) for key in ("started", "finished"))
        return max((finished - started).total_seconds(), 0.0)
    except (KeyError, ValueError, TypeError):
        return None


def _gpus(run: Mapping[str, Any]) -> tuple[float, str | None]:
    """How many GPUs the engines held, and what they are called."""
    placement, engine, hardware = (_mapping(run.get(key)) for key in ("placement", "engine", "hardware"))
    listed = hardware.get("gpus")
    names = listed if isinstance(listed, list) else []
    name = engine.get("gpu") or engine.get("device_name") or (names[0] if names else None) or hardware.get("gpu")
    if isinstance(name, Mapping):
        name = name.get("name")
    held = (number(placement.get("engine_actors")) or 0) * (number(placement.get("gpus_per_engine")) or 0)
    if not held and str(engine.get("device", "")).startswith("cuda"):
        held = float(len(names) or 1)
    return held, str(name) if name else None


def _mfu(
    run: Mapping[str, Any],
    throughput: Mapping[str, Any],
    seconds: float | None,
    num_gpus: float,
    gpu_name: str | None,
) -> tuple[float | None, str | None]:
    """Model FLOP utilisation: 2 FLOP a parameter and token, attention left out, over the GPUs' peak."""
    recorded = number(run.get("mfu")) or number(throughput.get("mfu"))
    if recorded:
        return recorded, "as the run recorded it"
    gpu = find_gpu(gpu_name) if gpu_name else None
    peak = gpu.flops if gpu else None
    sizes = _model_sizes(run)
    tokens = [number(throughput.get(name)) for name in ("prompt_tokens", "output_tokens", "visual_tokens")]
    if not (peak and sizes and seconds and num_gpus) or tokens[0] is None or tokens[1] is None:
        return None, None
    language, vision = sizes
    flops = 2 * language * (tokens[0] + tokens[1]) + 2 * vision * 4 * (tokens[2] or 0.0)
    basis = f"2 FLOP a parameter and token without attention, over {peak / 1e12:,.0f} TFLOP/s dense bfloat16 a GPU"
    return flops / (peak * num_gpus * seconds), basis


def _model_sizes(run: Mapping[str, Any]) -> tuple[float, float] | None:
    model, engine = _mapping(run.get("model")), _mapping(run.get("engine"))
    for facts in (model, engine):
        parameters = number(facts.get("num_parameters"))
        if parameters:
            return parameters, number(facts.get("num_vision_parameters")) or 0.0
    match = re.search(r"qwen2-vl-(2b|7b|72b)", str(model.get("path", "")), re.I)
    return _QWEN2_VL_SIZES[match[1].lower()] if match else None


def _stages(run: Mapping[str, Any], seconds: float | None) -> Iterator[tuple[str, int, float, float | None]]:
    """Each stage once, its workers' figures added up. Both shapes are read: a list of workers, a dict of stages."""
    recorded = run.get("stages")
    workers: list[Mapping[str, Any]] = []
    if isinstance(recorded, Mapping):
        workers = [{"kind": name, **_mapping(facts)} for name, facts in recorded.items()]
    elif isinstance(recorded, list):
        workers = [facts for facts in recorded if isinstance(facts, Mapping)]
    for name in dict.fromkeys(str(worker.get("kind") or worker.get("name") or "stage") for worker in workers):
        mine = [worker for worker in workers if str(worker.get("kind") or worker.get("name") or "stage") == name]
        busy = sum(number(worker.get("busy_s")) or 0.0 for worker in mine)
        idle = [number(worker.get("idle_s")) for worker in mine]
        count = sum(int(number(worker.get("workers")) or 1) for worker in mine)
        known_idle = [value for value in idle if value is not None]
        total = busy + sum(known_idle) if known_idle else (seconds or 0.0) * count
        yield name, count, busy, min(busy / total, 1.0) if total > 0 else None


def _bottleneck(stages: Sequence[tuple[str, int, float, float | None]]) -> str | None:
    shares = {name: share for name, _, _, share in stages if share is not None}
    if "engine" not in shares:
        return None
    engine = shares["engine"]
    if engine >= 0.9:
        return (
            f"The engine was busy {engine:.0%} of the time: it set the pace. "
            "More or faster GPUs would help, more CPU actors would not."
        )
    others = {name: share for name, share in shares.items() if name != "engine"}
    if others:
        name, share = max(others.items(), key=lambda item: item[1])
        if share > 0.6:
            return (
                f"The engine waited {1 - engine:.0%} of the time while {name} was busy {share:.0%}: "
                f"more CPU actors (resources.preprocess_actors) would speed it up."
            )
    return (
        f"The engine was busy {engine:.0%} of the time and no other stage was near its limit: "
        "the run was short, or reading the data was slow."
    )


def rates(progress: Sequence[Mapping[str, Any]], name: str, most: int = 120) -> list[tuple[float, float]]:
    """(seconds, per second) of a growing count, at most `most` points; empty where it was not recorded."""
    known = [(float(line["t"]), float(line[name])) for line in progress if number(line.get(name)) is not None]
    if len(known) < 3:
        return []
    start = known[0][0]
    step = max(1, -(-len(known) // most))
    chosen = known[::step]
    if chosen[-1] != known[-1]:
        chosen.append(known[-1])
    return [
        (t - start, max((value - before) / (t - earlier), 0.0))
        for (earlier, before), (t, value) in itertools.pairwise(chosen)
        if t > earlier
    ]


def settings_lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its full name, secrets hidden."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from settings_lines(value, f"{name}.")
        elif _is_secret(name):
            yield name, HIDDEN if value not in (None, "", {}, []) else _show(value)
        else:
            yield name, _show(value)


def _is_secret(name: str) -> bool:
    *sections, key = name.split(".")
    if any(section.endswith("storage_options") for section in sections):
        return key not in _HARMLESS_STORAGE
    return _SECRET.search(key) is not None


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value) or "none"
    return shown_source(str(value)) if not isinstance(value, Mapping) else "none"


def setting_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, baseline, this run) of the settings that differ and that may change answers or speed."""
    mine, other = dict(settings_lines(ours)), dict(settings_lines(theirs))
    names = dict.fromkeys([*other, *mine])
    return [
        (name, other.get(name, "not set"), mine.get(name, "not set"))
        for name in names
        if mine.get(name) != other.get(name) and not name.startswith(("output.", "evaluate.", "run."))
    ]


def shown_source(source: str) -> str:
    """A source fit to be sent on: data: URLs cut short, passwords and signatures of URLs taken out."""
    if source.startswith("data:"):
        return source.partition(",")[0][:60] + ",…"
    scheme, separator, rest = source.partition("://")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        host, slash, path = rest.partition("/")
        host = host.rpartition("@")[2]
        path, question, _ = path.partition("?")
        return f"{scheme}://{host}{slash}{path}" + ("?…" if question else "")
    return source


def without_secrets(text: str) -> str:
    """A message whose URLs have lost their passwords and signatures."""
    return _URL.sub(lambda match: shown_source(match[0]), text)


def headline(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran: model, prompt, sampling, data, code, hardware."""
    config = _mapping(run.get("config"))
    model, versions, hardware = (_mapping(run.get(key)) for key in ("model", "versions", "hardware"))
    engine, manifest = _mapping(run.get("engine")), _mapping(run.get("manifest"))
    prompt, sampling = _mapping(config.get("prompt")), _mapping(config.get("sampling"))
    lines: list[tuple[str, str | None]] = [
        ("Model", _joined(model.get("path") or model.get("name"), _revision(model.get("revision")))),
        (
            "Engine",
            _joined(
                engine.get("kind"),
                engine.get("dtype"),
                engine.get("device"),
                engine.get("attention") and f"{engine['attention']} attention",
            ),
        ),
        ("Prompt", _text(prompt.get("template")) or ("from the manifest's rows" if config else None)),
        ("System prompt", _text(prompt.get("system"))),
        ("Sampling", _sampling(sampling)),
        ("Data", _data(manifest, config)),
        ("Code", _joined(_version(versions), _commit(versions.get("commit")))),
        ("Packages", _joined(*(f"{n} {versions[n]}" for n in ("torch", "transformers", "ray") if versions.get(n)))),
        ("Hardware", _hardware(run, hardware)),
        ("Started", _moment(run.get("started"))),
    ]
    return [(name, text) for name, text in lines if text]


def _joined(*parts: Any) -> str | None:
    return ", ".join(str(part) for part in parts if part) or None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _revision(value: Any) -> str | None:
    return f"revision {value}" if value else None


def _version(versions: Mapping[str, Any]) -> str | None:
    version = versions.get("qwen2-vl-batch")
    return f"qwen2-vl-batch {version}" if version else None


def _commit(value: Any) -> str | None:
    if not value:
        return None
    commit, _, changed = str(value).partition("-")
    return f"commit {commit[:12]}" + (" with changes" if changed else "")


def _sampling(sampling: Mapping[str, Any]) -> str | None:
    if not sampling:
        return None
    temperature = number(sampling.get("temperature")) or 0.0
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    extras = [
        f"{name} {sampling[name]}"
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0), ("n", 1))
        if temperature and sampling.get(name, off) != off
    ]
    seed = sampling.get("seed")
    return _joined(
        how, *extras, f"at most {sampling.get('max_tokens')} tokens", f"seed {seed}" if seed is not None else None
    )


def _data(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    fingerprint = manifest.get("fingerprint")
    path = manifest.get("path") or _mapping(config.get("input")).get("path")
    if not isinstance(fingerprint, Mapping):
        return _joined(path and shown_source(str(path)), fingerprint and f"fingerprint {str(fingerprint)[:16]}")
    files = fingerprint.get("files") or []
    rows, size = number(fingerprint.get("num_rows")), sum(number(entry[1]) or 0 for entry in files if len(entry) > 1)
    return _joined(
        path and shown_source(str(path)),
        f"{rows:,.0f} rows in {len(files):,} file{'s' if len(files) != 1 else ''}" if rows is not None else None,
        f"{size:,.0f} bytes" if size else None,
    )


def _hardware(run: Mapping[str, Any], hardware: Mapping[str, Any]) -> str | None:
    num_gpus, name = _gpus(run)
    gpus = f"{num_gpus:g} x {name or 'GPU'}" if num_gpus else None
    cpus = hardware.get("cpus")
    return _joined(gpus, f"{cpus} CPUs" if cpus else None, hardware.get("processor"), hardware.get("system"))


def _moment(value: Any) -> str | None:
    try:
        return datetime.datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return None
