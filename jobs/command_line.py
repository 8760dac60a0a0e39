"""`python -m jobs.NAME --config FILE ... [--section.key value ...]`: arguments to overrides, help from the docstrings.

Knows the config's shape; not what any job does with it.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from pydantic_core import PydanticUndefined
from rich.console import Console

from pipeline.config import Section, written
from pipeline.config_file import fields_of, load_config
from pipeline.errors import ConfigError, JobError, RestartNeeded
from pipeline.storage import StorageError

ConfigType = TypeVar("ConfigType", bound=Section)

Flags: TypeAlias = Mapping[str, tuple[str, str | None]]

FLAGS: Flags = {
    "--verbose": ("run.verbose", "true"),
    "--retry-failed": ("run.retry_failed", "all"),
    "--on-change": ("run.on_change", None),
    "--profile": ("run.profile_steps", None),
}
"""Short spellings: the key each stands for, and its value when none is given."""

EXIT_INTERRUPTED = 130
EXIT_NO_ANSWER = 4
"""The run is complete, and every row of it failed."""


def run_job(
    model: type[ConfigType],
    run: Callable[[ConfigType], int],
    argv: Sequence[str] | None,
    *,
    name: str,
    about: str,
    flags: Flags = FLAGS,
) -> int:
    """Load the config, run the job, and turn its errors into one line and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print_help(model, name, about, flags)
        return 0
    try:
        paths, overrides = parse_arguments(arguments, flags)
        return run(load_config(model, paths, overrides))
    except JobError as error:
        if isinstance(error, RestartNeeded) and arguments == sys.orig_argv[-len(arguments) :]:
            from pipeline.execution.run import restart_command  # loads Ray, which most commands can do without

            print(f"{error}: it starts again now", file=sys.stderr)
            restart_command()
        print(f"error: {error}", file=sys.stderr)
        if not arguments:
            example = f"--config {_example_config(name)}"
            print(f"`qwen2-vl-batch {name} --help` lists every key; a first run: {example}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return EXIT_INTERRUPTED
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return JobError.exit_code


def parse_arguments(arguments: Sequence[str], flags: Flags = FLAGS) -> tuple[list[str], dict[str, str]]:
    """The configs' paths and the overrides: `--a.b value` and `--a.b=value` alike. Raises ConfigError."""
    paths: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if not key.startswith("--"):
            raise ConfigError(f"found {argument!r} on the command line; expected --config FILE or --section.key value")
        name, default = flags.get(key, (key[2:], None))
        if not equals:
            if default is None and not rest:
                raise ConfigError(f"{key} needs a value")
            value = rest.pop(0) if default is None else default
        if key == "--config":
            paths.append(value)
        else:
            overrides[name] = value
    return paths, overrides


def print_help(model: type[Section], name: str, about: str, flags: Flags = FLAGS) -> None:
    """Every key of the config with its kind, default and docstring."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(about.strip(), markup=False)
    config = _example_config(name)
    console.print(f"\npython -m jobs.{name} --config {config} [--section.key value ...]", markup=False)
    console.print("--config may be given several times: later files override earlier ones.", markup=False)
    console.print(
        "Values are taken as they stand. Lists and mappings are written as in YAML ([a, b], {a: b}); text alone is a "
        'list of one, which may be quoted as in YAML ("\\n").\n',
        markup=False,
    )
    section = ""
    for key, field in fields_of(model):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            console.print(f"{section}:", markup=False)
        default = "required" if field.is_required() else f"default {default_text(field)}"
        console.print(f"  --{key} ({kind_text(field.annotation)}; {default})", markup=False)
        if field.description:
            console.print(f"      {' '.join(field.description.split())}", markup=False)
    console.print("\nshort forms: " + ", ".join(f"{flag} for {key}" for flag, (key, _) in flags.items()), markup=False)


def _example_config(name: str) -> str:
    return f"configs/{'caption' if name == 'plan' else name}.yaml"  # a plan is of the caption job


def default_text(field: Any) -> str:
    value = field.default_factory() if field.default is PydanticUndefined else field.default
    return written(list(value) if isinstance(value, tuple) else value)


def kind_text(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(kind_text(kind) for kind in arguments if kind is not type(None))
    if origin is typing.Annotated:
        return kind_text(arguments[0])
    if origin in (list, tuple):
        return f"list of {kind_text(arguments[0])}"
    if origin is dict:
        return f"mapping to {kind_text(arguments[-1])}"
    return {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true | false",
        "PoolSize": "number | fewest,most",
        "Any": "anything",
    }.get(getattr(annotation, "__name__", ""), str(annotation))
