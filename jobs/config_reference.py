"""Write docs/configuration.md, the reference of every config key: python -m jobs.config_reference FILE

The text is the docstrings of the config classes; tests/unit/test_config_reference.py keeps the file current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.command_line import default_text, kind_text
from jobs.evaluate import EvaluateConfig
from pipeline.config import CaptionConfig, Section, fields_of
from pipeline.planning.plan import PlanConfig

_HEAD = """# Configuration

Written by `make docs` from the docstrings of the config; do not edit it by hand.

A config is a YAML file of sections. Every key can be set on the command line too: `--section.key value` or
`--section.key=value`. `--config` may stand several times: later files win, key by key. Unknown keys and wrong values
are errors, and all of them are listed at once.
"""


def reference() -> str:
    """The page."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    (path,) = sys.argv[1:] if argv is None else argv
    Path(path).write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
