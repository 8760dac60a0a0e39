"""Write the generated pages of docs/: python -m jobs.documentation

    docs/configuration.md   every config key, from the docstrings of the config classes
    docs/file_map.md        every source file, from the first sentence of its docstring

tests/unit/test_documentation.py fails when a page is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jobs.command_line import default_text, kind_text
from jobs.evaluate import EvaluateConfig
from pipeline.config import CaptionConfig, Section
from pipeline.config_file import fields_of
from pipeline.planning.plan import PlanConfig

ROOT = Path(__file__).resolve().parent.parent
_MAP_HEAD = """# File map

Written by `make docs` from the first sentence of each file's docstring.
"""
_HEAD = """# Configuration

Written by `make docs` from the docstrings of the config; do not edit it by hand.

A config is a YAML file of sections. Every key can be set on the command line too: `--section.key value` or
`--section.key=value`. `--config` may be given several times: later files override earlier ones, key by key. Unknown
keys and wrong values are errors, and all of them are listed at once.
"""


def configuration() -> str:
    """The page of every config key."""
    seen: set[str] = set()
    parts = [_HEAD]
    for title, config in (
        ("caption", CaptionConfig),
        ("plan", PlanConfig),
        ("evaluate", EvaluateConfig),
    ):
        parts.append(f"\n## `{title}`\n")
        if seen:
            parts.append("The keys of `caption`, and:\n" if issubclass(config, CaptionConfig) else "")
        parts += _tables(config, seen)
    return "\n".join(part for part in parts if part) + "\n"


def _tables(config: type[Section], seen: set[str]) -> Iterator[str]:
    """A table for each section, of the keys that no earlier job has."""
    sections: dict[str, list[str]] = {}
    for key, field in fields_of(config):
        if key in seen:
            continue
        seen.add(key)
        section, _, name = key.rpartition(".")
        default = "required" if field.is_required() else f"`{default_text(field)}`"
        meaning = " ".join((field.description or "").split())
        row = (f"`{name}`", kind_text(field.annotation), default, meaning)
        sections.setdefault(section, []).append("| " + " | ".join(map(_escape, row)) + " |")
    for section, rows in sections.items():
        yield f"\n### {section}\n\n| key | kind | default | meaning |\n|---|---|---|---|"
        yield from rows


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def file_map() -> str:
    """The page of every source file."""
    lines = [f"{name:<26} {about}".rstrip() for root in ("jobs", "pipeline") for name, about in _files(ROOT / root, 0)]
    return "\n".join([_MAP_HEAD, "```", *lines, "```"]) + "\n"


def _files(folder: Path, depth: int) -> Iterator[tuple[str, str]]:
    indent = "  " * depth
    yield f"{indent}{folder.name}/", _first_sentence(folder / "__init__.py")
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("__"):
            yield f"{indent}  {path.name}", _first_sentence(path)
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").exists():
            yield from _files(inner, depth + 1)


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


PAGES: Mapping[str, Callable[[], str]] = {"configuration.md": configuration, "file_map.md": file_map}


def main() -> int:
    """Write the pages; returns the exit code."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
