"""The model card that goes with the demo checkpoint.

Knows wording; the numbers are handed to it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from pipeline.demo.training import recipe


def model_card(
    *, made_by: str, num_parameters: int, num_examples: int, exact_match: Mapping[str, float], note: str = ""
) -> str:
    """`README.md` of the checkpoint.

    `made_by`: the command, its seed, steps, time and machine. `exact_match`: by task, of the weights as written.
    """
    rows = "\n".join(f"| `{task}` | {share:.1%} |" for task, share in exact_match.items())
    card = f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny Qwen2-VL that knows one drawn world

`Qwen2VLForConditionalGeneration` with {num_parameters / 1e6:.2f} million parameters, trained from nothing on
pictures and clips of coloured shapes on a 3 x 3 board. It is there so that a whole batch job runs for real, right
answers included, on a machine with nothing else. **It knows its own scenes and questions only**: shown a photograph
or asked anything else, it answers in the same words, and wrongly.

| task | exact match, {num_examples} held-out questions |
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

Made by {made_by}.
{textwrap.fill(note, 118)}
"""
    return card.rstrip() + "\n"
