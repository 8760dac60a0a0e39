"""Imported by the process that drivers are forked from: what the command line's driver has loaded when it begins."""

from pipeline.preprocess.prompt import spare_torch
from tests.faults import job

spare_torch()
__all__ = ["job"]
