"""A drawn world whose truth is known: scenes and questions, a manifest of them, the training recipe, the checkpoint.

    scenes      still pictures and moving clips, drawn from a seed
    clips       frames to H.264 files and back
    tasks       seven kinds of question with exactly known answers
    manifest    a folder of media files and the manifest that asks about them
    tokens      the small byte-level tokenizer and the chat template
    samples     one question as the model's input, through the pipeline's own preprocessing
    recipe      the shape of the model and of its preprocessing
    train       the recipe itself: python -m pipeline.demo.training.train
    evaluate    exact match on held-out questions: python -m pipeline.demo.training.evaluate

The checkpoint knows this world only; it is there so that the whole job runs for real on a bare machine.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The folder with the trained checkpoint: a standard Hugging Face one."""
