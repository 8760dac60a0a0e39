"""The command `qwen2-vl-batch`: the first argument names the job, the others are the job's own.

    caption      caption, tag or ask about every row of a manifest
    plan         forecast rows, tokens, memory, time and cost of a caption job
    evaluate     answer a manifest that has references, and score the answers
    report       write the page of a run folder
    submit       run a job on a Ray cluster
    benchmark    measure the pipeline and its parts

`qwen2-vl-batch caption --help` lists the options of a job. `python -m jobs.caption` is the same command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

COMMANDS = {
    "caption": "jobs.caption",
    "plan": "jobs.plan",
    "evaluate": "jobs.evaluate",
    "report": "jobs.report",
    "submit": "jobs.submit",
    "benchmark": "jobs.benchmark.__main__",
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMANDS, argv, about=__doc__ or "")


def run_command(modules: Mapping[str, str], argv: Sequence[str] | None, *, about: str) -> int:
    """Run `main` of the module that the first argument names; returns its exit code, or 2 for an unknown name.

    Imports no other module, so that help is instant and a job needs its own packages only.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(about.strip())
        return 0
    name, *rest = arguments
    if name not in modules:
        print(f"error: found {name!r}; expected one of {', '.join(modules)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(modules[name]).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
