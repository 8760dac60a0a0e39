"""The prompts that a checkpoint says it was trained on: `prompts.json`, a list of texts under `templates`.

A small checkpoint that knows a few questions answers all others with nonsense. Where it brings this file, a run says
once that its prompt is another one. Not a file of transformers'; most checkpoints have none.
"""

from __future__ import annotations

from pipeline.checkpoint.locate import read_json

_MAX_SHOWN = 3


def untrained_prompt(model_path: str, template: str | None, *, revision: str | None = None) -> str | None:
    """A sentence on a prompt template that the checkpoint was not trained on; None where there is nothing to say."""
    known = (read_json(model_path, "prompts.json", revision) or {}).get("templates", [])
    if template is None or not known or template.strip() in known:
        return None
    shown = ", ".join(map(repr, known[:_MAX_SHOWN]))
    return (
        f"this checkpoint was trained on a few prompts alone, such as {shown}; prompt.template is {template!r}: "
        "expect answers without meaning"
    )
