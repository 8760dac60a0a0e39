"""The model card that goes with the demo checkpoint.

Knows wording; the numbers are handed to it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.demo.training import recipe


@dataclass(frozen=True)
class TrainingFacts:
    """What a run of the recipe was and came to."""

    command: str
    seed: int
    steps: int
    minutes: float
    machine: str
    parameters: int
    held_out_examples: int
    exact_match: Mapping[str, float]
    """By task, of the weights as written."""
    note: str = ""
    """What else should be known of this run."""


def model_card(facts: TrainingFacts) -> str:
    """`README.md` of the checkpoint."""
    rows = "\n".join(f"| `{task}` | {share:.1%} |" for task, share in facts.exact_match.items())
    return (
        f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny Qwen2-VL that knows one drawn world

`Qwen2VLForConditionalGeneration` with {facts.parameters / 1e6:.2f} million parameters, trained from nothing on
pictures and clips of coloured shapes on a 3 x 3 board. It is there so that a whole batch job runs for real, right
answers included, on a machine with nothing else. **It knows its own scenes and questions only**: shown a photograph
or asked anything else, it answers in the same words, and wrongly.

| task | exact match, {facts.held_out_examples} held-out questions |
| --- | --- |
{rows}

Held-out questions come from seeds that training never saw, clips went through real H.264 files, pictures and clips
were announced as `Picture 1: ` and `Video 1: ` (`add_vision_id`), decoding was greedy, in float32, from these bfloat16
weights. The world of `text` is small: its sums and comparisons recur between training and test.

What it must be given, or its answers suffer:

| setting | value |
| --- | --- |
| `add_vision_id` | true (what the accuracies above were measured with); questions about several pictures need it |
| order | media first, then the question |
| image `min_pixels`, `max_pixels` | {recipe.IMAGE_MIN_PIXELS}, {recipe.IMAGE_MAX_PIXELS} |
| video `min_pixels`, `max_pixels` a frame | {recipe.VIDEO_MIN_PIXELS}, {recipe.VIDEO_MAX_PIXELS} |
| video `fps`, least frames | {recipe.VIDEO_FPS:g}, {recipe.VIDEO_MIN_FRAMES} |
| system prompt | the template's default |

Made by `{facts.command}` with seed {facts.seed}: {facts.steps} steps in
{facts.minutes:.0f} minutes ({facts.machine}).
{textwrap.fill(facts.note, 118)}
""".rstrip()
        + "\n"
    )
