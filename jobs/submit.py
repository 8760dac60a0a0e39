"""Run a job on a Ray cluster from here: check the config, send the code, follow the logs, pass the exit code on.

    python -m jobs.submit --address http://127.0.0.1:8265 --config FILE ... [--section.key value ...]

    --address URL       the cluster's dashboard; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS
    --job NAME          caption (default) or evaluate
    --env none | pip    none (default): the cluster's image has the packages; pip: each node installs the versions of
                        constraints.txt into an environment of its own, once
    --no-wait           return once the job is submitted

Sent is the code without tests, data and weights (.rayignore): under a megabyte, and the demo's checkpoint where
`model.path` is `demo`. The token that the cluster asks for is found where Ray finds it: RAY_AUTH_TOKEN, the file that
RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import socket
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.command_line import EXIT_INTERRUPTED, parse_words
from pipeline import storage
from pipeline.checkpoint.locate import DEMO
from pipeline.config import CaptionConfig, load_config
from pipeline.errors import ClusterError, ConfigError, JobError
from pipeline.results.run_record import COMMIT_VARIABLE, code_commit

ROOT = Path(__file__).resolve().parent.parent
STOP_WAIT_S = 60
"""Seconds between `ray job stop`'s SIGTERM and SIGKILL: enough to publish finished rows to a bucket."""
_DEMO_CHECKPOINT = "/pipeline/demo/checkpoint"
_PATHS = ("input.path", "output.path", "model.path", "run.path", "evaluate.baseline", "evaluate.manifest_path")
"""Keys of all jobs that hold a path: it must mean the same thing on the cluster."""
_CONNECT_S = 30.0
_RECONNECT_S = 5.0


@dataclass(frozen=True)
class Submission:
    """What was asked for on the command line."""

    address: str
    job: str
    env: str
    wait: bool
    config_paths: list[str]
    overrides: dict[str, str]


@dataclass(frozen=True)
class Cluster:
    """A cluster that answered."""

    address: str
    token: str | None
    is_here: bool
    """Whether its head node is this machine, so that paths mean the same thing there."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the job's exit code, 130 when it was stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    try:
        return submit(read_words(words, os.environ))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_words(words: Sequence[str], environment: Mapping[str, str]) -> Submission:
    """The command line's meaning. Raises ConfigError."""
    left = [word for word in words if word != "--no-wait"]
    paths, overrides = parse_words(left)
    given = overrides.pop("address", None)
    address = given or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS")
    if not address:
        raise ConfigError("no cluster named: give --address http://HOST:8265, its dashboard's address")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: expected the dashboard's address, such as http://127.0.0.1:8265")
    job, env = overrides.pop("job", "caption"), overrides.pop("env", "none")
    if job not in ("caption", "evaluate"):
        raise ConfigError(f"--job {job}: allowed: caption, evaluate")
    if env not in ("none", "pip"):
        raise ConfigError(f"--env {env}: allowed: none (the cluster's image has the packages), pip")
    return Submission(address.rstrip("/"), job, env, len(left) == len(words), paths, overrides)


def submit(asked: Submission) -> int:
    """Submit the job and follow it. Raises ConfigError, ClusterError."""
    if not (ROOT / "pyproject.toml").exists():
        raise ConfigError(f"a job is submitted from a checkout of this project; {ROOT} is none")
    logging.disable(logging.WARNING)  # Ray's client tells every step
    config = load_config(_config_class(asked.job), asked.config_paths, asked.overrides)
    cluster = find_cluster(asked.address, find_token(os.environ))
    overrides = {**asked.overrides, **settled_paths(_values(config), cluster)}
    client = _client(cluster)
    try:
        submission_id = client.submit_job(
            entrypoint=entrypoint(asked.job, asked.config_paths, overrides),
            runtime_env=runtime_environment(asked.env, _values(config)),
        )
    except RuntimeError as error:
        raise ClusterError(f"the cluster refused the job: {_first_line(error)}") from error
    print(f"submitted {submission_id} to {cluster.address}; output {overrides.get('output.path', config.output.path)}")
    mode = "RAY_AUTH_MODE=token " if cluster.token else ""
    for verb, options in (("logs", " --follow"), ("stop", "")):
        print(f"  {verb}: {mode}ray job {verb} {submission_id} --address {cluster.address}{options}", flush=True)
    return _follow(client, submission_id) if asked.wait else 0


def _config_class(job: str) -> type[CaptionConfig]:
    if job == "caption":
        return CaptionConfig
    from jobs.evaluate import EvaluateConfig

    return EvaluateConfig


def _values(config: CaptionConfig) -> dict[str, str]:
    """The config's paths, by full name."""
    found = {}
    for name in _PATHS:
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section, None), key, None)
        if value is not None:
            found[name] = value
    return found


def find_token(environment: Mapping[str, str]) -> str | None:
    """The token for the cluster, from where Ray looks for it; None where there is none. Raises ConfigError."""
    if environment.get("RAY_AUTH_MODE") == "disabled":
        return None
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if not named:
            return None
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: can't read {named}: {error.strerror}") from error
    if not token:
        raise ConfigError(f"the token file {path} is empty: `ray get-auth-token` on the head node prints the token")
    return token


def find_cluster(address: str, token: str | None) -> Cluster:
    """The cluster at a dashboard's address. Raises ClusterError when it does not answer or refuses the token."""
    import requests

    headers = _headers(token)
    try:
        answer = requests.get(f"{address}/nodes?view=summary", headers=headers, timeout=_CONNECT_S)
    except requests.RequestException as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}): is the cluster up "
            "(`ray start --head`, `ray status`), and the dashboard's port, 8265 by default, open or forwarded to here?"
        ) from error
    if answer.status_code in (401, 403):
        found = "it refused the token that was found here" if token else "it asks for a token, and none was found here"
        raise ClusterError(
            f"{address}: {found}. `ray get-auth-token` on the head node prints it: "
            "put it into RAY_AUTH_TOKEN or into ~/.ray/auth_token"
        )
    try:
        nodes = answer.json()["data"]["summary"]
    except (ValueError, LookupError, TypeError) as error:
        raise ClusterError(
            f"{address} answers, but not as a Ray dashboard does (HTTP {answer.status_code}): "
            "give the dashboard's address, port 8265 by default"
        ) from error
    return Cluster(address, token, any(_is_here(node) for node in nodes))


def _is_here(node: Mapping[str, Any]) -> bool:
    """Whether a head node runs on this machine: a forwarded port makes a far one look near, so its address won't do."""
    raylet = node.get("raylet") or {}
    if not raylet.get("isHeadNode") or raylet.get("nodeManagerHostname") != socket.gethostname():
        return False
    return Path(raylet.get("rayletSocketName") or "/nowhere").is_socket()


def settled_paths(paths: Mapping[str, str], cluster: Cluster) -> dict[str, str]:
    """Overrides that make relative paths absolute where the head node is this machine.

    Raises ConfigError elsewhere: only code is sent, and what is written below it is lost with the job.
    """
    settled = {}
    for name, value in paths.items():
        if storage.is_remote(value) or value.startswith(("/", "~")):
            continue
        if name == "model.path" and not (value.startswith(("./", "../")) or Path(value).is_dir()):
            continue  # `demo`, or a hub name
        if not cluster.is_here:
            raise ConfigError(
                f"{name}: {value} is relative, and {cluster.address} is another machine, which is sent the code only: "
                "give a bucket (s3://..., gs://...) or an absolute path on a disk that the cluster's nodes share"
            )
        settled[name] = os.path.abspath(value)
    return settled


def entrypoint(job: str, config_paths: Sequence[str], overrides: Mapping[str, str]) -> str:
    """The command that the cluster runs in the folder that was sent. Raises ConfigError."""
    words = ["exec", "python", "-m", f"jobs.{job}"]  # exec: Ray's signals are for the job, not for a shell
    for path in config_paths:
        sent = os.path.relpath(path, ROOT)
        if not sent.startswith("configs" + os.sep):
            raise ConfigError(f"{path} is not among the files that are sent: put it into {ROOT / 'configs'}")
        words += ["--config", sent]
    for name, value in overrides.items():
        words.append(f"--{name}={value}")
    return " ".join(shlex.quote(word) for word in words)


def runtime_environment(env: str, paths: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment: the code, and the packages where the image does not bring them."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    commit = code_commit(ROOT)
    if commit:
        variables[COMMIT_VARIABLE] = commit
    found: dict[str, Any] = {
        "working_dir": str(ROOT),
        "excludes": [] if paths["model.path"] == DEMO else [_DEMO_CHECKPOINT],
        "env_vars": variables,
    }
    if env == "pip":
        schemes = {value.partition("://")[0] for value in paths.values() if storage.is_remote(value)}
        found["pip"] = {"packages": _packages(schemes)}
    return found


def _packages(schemes: set[str]) -> list[str]:
    """What pip is to install on each node: the project's dependencies as constraints.txt pins them, without Ray."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = list(project["dependencies"])
    for scheme, extra in (("s3", "s3"), ("gs", "gcs")):
        if scheme in schemes:
            needed += project["optional-dependencies"][extra]
    # The pins travel with the code. Ray keeps an environment by these lines, so the digest makes new pins a new one.
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()[:12]
    pins = f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/constraints.txt  # {digest}"
    return [pins, *(package for package in needed if not re.match(r"ray\b", package))]


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _client(cluster: Cluster) -> Any:
    # Ray lets these win over the address that it is given.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(cluster.address, headers=_headers(cluster.token))
    except (RuntimeError, ConnectionError) as error:
        raise ClusterError(f"{cluster.address}: {_first_line(error)}") from error


def _follow(client: Any, submission_id: str) -> int:
    """Show the job's logs till its end; gives its exit code."""
    try:
        details = asyncio.run(_show_logs(client, submission_id))
    except KeyboardInterrupt:
        print(f"\nno longer following {submission_id}; it goes on", flush=True)
        return EXIT_INTERRUPTED
    status = str(details.status.value)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        print(f"{submission_id} was stopped; submitting it again goes on where it was", flush=True)
        return EXIT_INTERRUPTED
    if details.driver_exit_code is None:  # it never ran, or its node went away: its logs don't say why
        raise ClusterError(f"{submission_id} failed: {str(details.message).strip()}")
    return int(details.driver_exit_code)


async def _show_logs(client: Any, submission_id: str) -> Any:
    """Print the logs as they come, through lost connections; gives the job's details once it has ended."""
    import aiohttp

    shown = 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(submission_id):  # always from the beginning
                sys.stdout.write(text[max(0, shown - position) :])
                sys.stdout.flush()
                position += len(text)
                shown = max(shown, position)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            print(f"(the connection was lost: {_first_line(error)}; trying again)", file=sys.stderr)
        try:
            details = client.get_job_info(submission_id)
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError) as error:
            print(f"(the cluster does not answer: {_first_line(error)}; trying again)", file=sys.stderr)
        await asyncio.sleep(_RECONNECT_S)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
