"""The Ray cluster: joining or starting one, its nodes, and where the output of Ray's processes goes.

Ray, its workers and the libraries below write to the process's own output. While a job runs, that goes to a log file,
and the job's own lines go to a copy of the real output.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private import auto_init_hook
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from rich.console import Console

from pipeline import storage
from pipeline.config import CaptionConfig, ResourcesConfig
from pipeline.errors import OutputError, ResourceError, first_line
from pipeline.execution.address import init_options
from pipeline.execution.placement import Node
from pipeline.results.run_folder import RunFolder

_CLEAN_UP_S = 60.0
"""Seconds after a signal in which further ones are ignored."""
_HANDLERS_EVERY_S = 0.002
"""Seconds between two restorations of the signals' handlers while Ray ends."""
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_LOOK_EVERY_S = 5.0
_SHOW_EVERY_S = 60.0
_KILLED_FOR_MEMORY = re.compile(
    r"killed due to the node running low on memory.*?was ([\d.]+ ?GB used / [\d.]+ ?GB) limit"
)
_LAST_WORDS = """
read -r told && exit
echo "the job's process has ended without a word; the same command resumes. How $1 ends:" >&2
tail -n 3 "$1" | cut -c 1-600 >&2
"""
"""A shell's commands: its input ends with the job's process, or has a line before that."""
_JOINING_HINT = (
    "; if the cluster uses tokens, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; "
    "resources.address local starts a private local Ray; __run/log.txt in the run folder has Ray's own lines"
)


@contextlib.contextmanager
def job_output(folder: RunFolder, *, verbose: bool) -> Iterator[Console]:
    """A console on the real output. Everything else that is written goes to `__run/log.txt` in the run folder; with
    `verbose` nothing does."""
    if verbose:
        yield Console(highlight=False)
    elif not storage.is_remote(folder.path):
        log_path = storage.local_path(folder.file("log.txt"))
        with _last_words(log_path), _output_to(log_path) as console:
            yield console
    else:
        log_path = os.path.join(tempfile.mkdtemp(prefix="qwen2-vl-batch-"), "log.txt")
        try:
            with _last_words(log_path), _output_to(log_path) as console:
                yield console
        finally:
            try:
                storage.publish_file(log_path, folder.file("log.txt"), folder.storage_options)
            except OSError as error:  # the log is not worth failing the job for
                print(f"{folder.file('log.txt')} is not up to date: {error}", file=sys.stderr)


@contextlib.contextmanager
def _last_words(log_path: str) -> Iterator[None]:
    """Shows on standard error how the log ends where this process is ended from outside or by Ray's core, which ends it
    when the cluster's head is gone: otherwise nobody would learn why, or that."""
    command = ["sh", "-c", _LAST_WORDS, "sh", log_path]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **pipes) as waiting:  # Ctrl-C is not for it
        try:
            yield
        finally:
            waiting.communicate(b"the job speaks for itself\n")


@contextlib.contextmanager
def _output_to(log_path: str) -> Iterator[Console]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = (os.dup(1), os.dup(2))
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    width = None if os.isatty(kept[0]) else 110
    screen = _Screen(os.fdopen(os.dup(kept[0]), "wb"), encoding="utf-8", errors="replace")
    console = Console(file=screen, highlight=False, width=width)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        with _memory_warnings(log_path, console):
            yield console
    finally:
        # A log on a full disk, or a screen that is gone, must not keep what comes after in the log.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        with contextlib.suppress(OSError, OutputError):
            screen.close()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(log)


class _Screen(io.TextIOWrapper):
    """The real output; where it takes no more, that ends the job with a reason, which rich alone would not give."""

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(
                f"the job's own lines can't be written any more ({error.strerror}); the same command resumes"
            ) from error


@contextlib.contextmanager
def _memory_warnings(log_path: str, console: Console) -> Iterator[None]:
    """Shows, in one line, what Ray writes to the log when it kills workers for memory. They run again, so that a job
    would only be slow, or start for ever, without a word."""
    ended = threading.Event()
    shown = -_SHOW_EVERY_S

    def watch() -> None:
        nonlocal shown
        with open(log_path, encoding="utf-8", errors="replace") as log:
            log.seek(0, os.SEEK_END)
            while not ended.wait(_LOOK_EVERY_S):
                found = _KILLED_FOR_MEMORY.findall(log.read())
                if found and time.monotonic() - shown >= _SHOW_EVERY_S:
                    shown = time.monotonic()
                    console.print(
                        f"Ray is killing workers because a node runs low on memory ({found[-1]}); their rows run "
                        "again. Lower resources.preprocess_actors, or give the node more memory; log.txt has more",
                        markup=False,
                    )

    thread = threading.Thread(target=watch, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _StopSignals:
    """Handles SIGTERM, with which clusters and containers stop a job, like Ctrl-C: KeyboardInterrupt, once.

    Further signals must not break off the clean-up, which would leave Ray's processes behind; one that comes when the
    clean-up has had its time ends the process.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._is_held = self._is_owed = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._is_owed = self._is_held
            if not self._is_held:
                raise KeyboardInterrupt
        elif time.monotonic() - self._first > _CLEAN_UP_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes meanwhile interrupts only afterwards."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_owed:
            self._is_owed = False
            raise KeyboardInterrupt


_signals = _StopSignals()


def stop_on_signals(*, again: bool = False) -> None:
    """Let the first SIGINT or SIGTERM raise KeyboardInterrupt in the main thread. `again` restores the handlers."""
    global _signals
    if not again:
        _signals = _StopSignals()
        atexit.register(_ignore_signals)
    with contextlib.suppress(ValueError):  # outside the main thread no handler can be set
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _signals)


def _ignore_signals() -> None:
    """The process is about to end by itself, and Python puts its handlers back to what the system does before that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def ray_cluster(resources: ResourcesConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Join the cluster this runs on or start one here, and leave it at the end.

    A Ray that the caller has started already is used and left running. `say` prints a line. Raises ResourceError when
    none can be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray hides the GPUs from actors that ask for none, which is what we want; this silences its warning about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # On a busy machine Ray's own 30 seconds for its first daemon were not enough.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "90")
    started_here = not ray.is_initialized()
    if started_here:
        tokens_before = {name: os.environ.get(name) for name in _TOKEN_VARIABLES}
        options = init_options(resources, say)
        named = options.get("address")
        try:
            try:
                ray.init(**options)
            except Exception as error:
                if named not in (None, "local") or isinstance(error, ConnectionError):
                    raise
                say(f"Ray did not start{_busy()}: {first_line(error)}; starting it once more")
                ray.shutdown()
                ray.init(**options)
        except SystemExit:  # from the handler of SIGTERM that ray.init installs before anything else
            raise KeyboardInterrupt from None
        except Exception as error:  # Ray raises plain Exception where its daemons start too late
            hint = _JOINING_HINT if isinstance(error, ConnectionError) else ""
            if "AF_UNIX path length" in str(error):
                hint = ": set TMPDIR to a shorter path"
            raise ResourceError(
                f"can't reach or start Ray ({named or 'here'}){_busy()}: {first_line(error)}{hint}"
            ) from error
    stop_on_signals(again=True)  # ray.init installs a handler that ends the process at once
    try:
        yield
    finally:
        if started_here:
            # A thread of Ray Data may outlive its dataset, and Ray connects by itself whatever calls it: that was seen
            # to leave the command that starts again a token mode that its cluster refuses.
            auto_init_hook.enable_auto_connect = False
            with _signals.held(), ThreadPoolExecutor(1, thread_name_prefix="leave") as pool:
                leaving = pool.submit(ray.shutdown)
                # Ray's core puts SIGTERM back to what the system does, seconds before the last process has ended.
                while not leaving.done():
                    stop_on_signals(again=True)
                    time.sleep(_HANDLERS_EVERY_S)
                stop_on_signals(again=True)
                leaving.result()
                _restore(tokens_before)


def _restore(tokens: Mapping[str, str | None]) -> None:
    """A Ray that starts here turns tokens on for the process: a job that then joins a cluster without them would be
    refused by it."""
    for name, value in tokens.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")  # Ray reads the environment again for this alone
    AuthenticationTokenLoader.instance().reset_cache()


def _busy() -> str:
    """What to say of a machine on which more wants to run than it has cores for."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" (this machine is busy: load {load:.0f} on {cores} cores)" if load > cores else ""


def local_path_notes(config: CaptionConfig, num_nodes: int) -> list[str]:
    """Warnings about local paths on a cluster of several nodes."""
    if num_nodes < 2:
        return []
    notes = []
    if not storage.is_remote(config.input.path):
        notes.append(f"input.path {config.input.path} must be a disk that all {num_nodes} nodes of the cluster share")
    if not storage.is_remote(config.output.path):
        notes.append(f"output.path {config.output.path} is written by this node alone ({socket.gethostname()})")
    return notes


def live_nodes() -> list[Node]:
    """The nodes that are alive, with all that they have, free or not."""
    return [
        Node(
            node["NodeID"],
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            store_bytes=float(node["Resources"].get("object_store_memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def on_driver_node() -> dict[str, Any]:
    """Options that pin an actor to the driver's node: both are lost together or not at all.

    By label, since a soft node affinity was seen to go to another node on a busy machine.
    """
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
