"""One medium decoded in the test's own process, which production does in another one."""

from __future__ import annotations

import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.preprocess.decode import OpenMedium
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import Uint8Array
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.size import fit_row


def new_buffer(num_bytes: int) -> Uint8Array:
    return np.empty(num_bytes, dtype=np.uint8)


def see_medium(
    kind: MediumKind, data: bytes | memoryview, settings: MediumSettings, options: MediaOptions, *, source: str
) -> SeenMedium:
    """Decode, resize and patchify. `max_visual_tokens` is applied to this medium alone."""
    medium = OpenMedium(kind, data, settings, options)
    fit_row([medium], options.max_visual_tokens)
    return medium.see(source=source, allocate=new_buffer)
