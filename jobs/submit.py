"""Run a job on a Ray cluster: check the config here, send the code, follow the logs, pass the job's exit code on.

    python -m jobs.submit --address http://127.0.0.1:8265 --config FILE ... [--section.key value ...]

The code is sent without tests, data and weights (.rayignore): under a megabyte, plus the demo checkpoint where
`model.path` is `demo`. Where the cluster asks for a token, it is read from where Ray reads it: RAY_AUTH_TOKEN, the file
that RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.command_line import EXIT_INTERRUPTED, parse_arguments
from pipeline import storage
from pipeline.checkpoint.locate import DEMO
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.errors import ClusterError, ConfigError, JobError, first_line
from pipeline.execution.dashboard import ADDRESS_VARIABLES, connect, show_logs, use_token
from pipeline.results.run_record import COMMIT_VARIABLE, code_commit

ROOT = Path(__file__).resolve().parent.parent
STOP_WAIT_S = 60
"""Seconds between `ray job stop`'s SIGTERM and SIGKILL: enough to publish finished rows to a bucket."""
_DEMO_CHECKPOINT = "/pipeline/demo/checkpoint"
_MODEL_PATHS = ("model.path", "model.adapter")
_PATHS = ("input.path", "output.path", *_MODEL_PATHS, "run.path", "evaluate.baseline", "evaluate.manifest_path")
"""Keys of all jobs that hold a path: it must mean the same thing on the cluster."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the job's exit code, 130 when it was stopped."""
    options, rest = _parser().parse_known_args(argv)
    try:
        paths, overrides = parse_arguments(rest)
        return submit(options, paths, overrides)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
    variables = " or ".join(ADDRESS_VARIABLES)
    parser.add_argument(
        "--address",
        metavar="URL",
        type=_dashboard_address,
        default=default,
        required=default is None,
        help=f"the cluster's dashboard, such as http://127.0.0.1:8265; default: {variables}",
    )
    parser.add_argument("--job", choices=("caption", "evaluate"), default="caption", help="default: caption")
    parser.add_argument(
        "--env",
        choices=("none", "pip"),
        default="none",
        help="none (default): the cluster's image has the packages; pip: each node installs the versions of "
        "constraints.txt into an environment of its own, once",
    )
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="return once the job is submitted")
    return parser


def _dashboard_address(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"found {text}; expected a dashboard's address: http://127.0.0.1:8265")
    return text.rstrip("/")


def submit(options: argparse.Namespace, config_paths: Sequence[str], overrides: Mapping[str, str]) -> int:
    """Submit the job and follow it; returns its exit code. Raises ConfigError, ClusterError."""
    if not (ROOT / "pyproject.toml").exists():
        raise ConfigError(f"found no checkout of this project at {ROOT}; submit jobs from one, whose code is sent")
    logging.disable(logging.WARNING)  # Ray's client logs every step
    mode = "RAY_AUTH_MODE=token " if use_token() else ""
    config = load_config(_config_class(options.job), config_paths, overrides)
    paths, address = _paths_of(config), options.address
    client, is_here = connect(address)
    overrides = {**overrides, **absolute_paths(paths, address, is_here=is_here)}
    try:
        submission_id = client.submit_job(
            entrypoint=entrypoint(options.job, config_paths, overrides),
            runtime_env=runtime_environment(options.env, paths),
        )
    except RuntimeError as error:
        raise ClusterError(f"the cluster refused the job: {first_line(error)}") from error
    print(f"submitted {submission_id} to {address}; output {overrides.get('output.path', config.output.path)}")
    for verb, extra in (("logs", " --follow"), ("stop", "")):
        print(f"  {verb}: {mode}ray job {verb} {submission_id} --address {address}{extra}", flush=True)
    return _follow(client, submission_id) if options.wait else 0


def _config_class(job: str) -> type[CaptionConfig]:
    if job == "caption":
        return CaptionConfig
    from jobs.evaluate import EvaluateConfig  # loads packages that the caption job does without

    return EvaluateConfig


def _paths_of(config: CaptionConfig) -> dict[str, str]:
    """The config's paths, by full name."""
    keys = {name: name.split(".") for name in _PATHS}
    values = {name: getattr(getattr(config, section, None), key, None) for name, (section, key) in keys.items()}
    return {name: value for name, value in values.items() if value is not None}


def absolute_paths(paths: Mapping[str, str], address: str, *, is_here: bool) -> dict[str, str]:
    """Overrides that make relative paths absolute where the head node is this machine.

    Raises ConfigError elsewhere: only code is sent, and what is written below it is lost with the job.
    """
    absolute = {}
    for name, value in paths.items():
        if storage.is_remote(value) or value.startswith(("/", "~")):
            continue
        if name in _MODEL_PATHS and not (value.startswith(("./", "../")) or Path(value).is_dir()):
            continue  # `demo`, or a hub name
        if not is_here:
            raise ConfigError(
                f"{name}: {value} is relative, and {address} is another machine, which is sent the code only: "
                "give a bucket (s3://..., gs://...) or an absolute path on a disk that the cluster's nodes share"
            )
        absolute[name] = os.path.abspath(value)
    return absolute


def entrypoint(job: str, config_paths: Sequence[str], overrides: Mapping[str, str]) -> str:
    """The command that the cluster runs in the folder that was sent. Raises ConfigError."""
    command = ["exec", "python", "-m", f"jobs.{job}"]  # exec: Ray's signals are for the job, not for a shell
    for path in config_paths:
        sent = os.path.relpath(path, ROOT)
        if not sent.startswith("configs" + os.sep):
            raise ConfigError(f"{path} is not among the files that are sent: put it into {ROOT / 'configs'}")
        command += ["--config", sent]
    return shlex.join([*command, *(f"--{name}={value}" for name, value in overrides.items())])


def runtime_environment(env: str, paths: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment: the code, and the packages where the image does not have them."""
    commit = code_commit(ROOT)
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **({COMMIT_VARIABLE: commit} if commit else {})}
    excludes = [] if paths["model.path"] == DEMO else [_DEMO_CHECKPOINT]
    schemes = {value.partition("://")[0] for value in paths.values() if storage.is_remote(value)}
    packages = {"pip": {"packages": _packages(schemes)}} if env == "pip" else {}
    return {"working_dir": str(ROOT), "excludes": excludes, "env_vars": variables, **packages}


def _packages(schemes: set[str]) -> list[str]:
    """What pip installs on each node: the project's dependencies as constraints.txt pins them, without Ray."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = list(project["dependencies"])
    for extra in sorted({storage.EXTRAS[scheme] for scheme in schemes if scheme in storage.EXTRAS}):
        needed += project["optional-dependencies"][extra]
    # The pins are sent with the code. Ray caches an environment by these lines: the digest makes new pins a new one.
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()[:12]
    pins = f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/constraints.txt  # {digest}"
    return [pins, *(package for package in needed if not re.match(r"ray\b", package))]


def _follow(client: Any, submission_id: str) -> int:
    """Show the job's logs until it ends; returns its exit code."""
    try:
        details = asyncio.run(show_logs(client, submission_id))
    except KeyboardInterrupt:
        print(f"\nno longer following {submission_id}, which keeps running", flush=True)
        return EXIT_INTERRUPTED
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        print(f"{submission_id} was stopped; submit it again to resume", flush=True)
        return EXIT_INTERRUPTED
    if details.driver_exit_code is None:  # it never ran, or its node was lost: its logs don't say why
        raise ClusterError(f"{submission_id} failed: {str(details.message).strip()}")
    return int(details.driver_exit_code)


if __name__ == "__main__":
    sys.exit(main())
