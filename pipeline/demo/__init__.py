"""A synthetic dataset whose right answers are known, and the small checkpoint that was trained on it.

    scenes        still pictures and moving clips, drawn from a seed
    clips         frames to H.264 files and back
    tasks         seven kinds of question with exactly known answers
    manifest      a folder of media files and the manifest that asks about them
    check         compares a finished run with the right answers
    training/     the recipe: python -m pipeline.demo.training.train
    checkpoint/   what the recipe made: a standard Hugging Face checkpoint

The checkpoint knows these scenes only; it is there so that the whole job runs for real on a bare machine.
"""

from __future__ import annotations

from pipeline.checkpoint.locate import DEMO_FOLDER

CHECKPOINT = DEMO_FOLDER
"""The folder with the trained checkpoint: a standard Hugging Face one."""
