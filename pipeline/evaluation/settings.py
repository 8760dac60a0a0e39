"""The config section `evaluate`: which columns hold the right answers, and how they are scored.

Knows names, metrics and layouts; not rows or files.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from pipeline.config import Section
from pipeline.config_values import NotNegative, Positive
from pipeline.evaluation.layout import Layout
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.slices import DERIVED_SLICES


def known_metric(name: str) -> str:
    """The name itself. Raises ValueError if there is no such metric."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name}; known: {', '.join(METRICS)}")
    return name


MetricName = Annotated[str, AfterValidator(known_metric)]


class ScoringSettings(Section):
    """Which columns hold what, and which metrics are computed."""

    references: str = "reference"
    """Column with the right answer or answers: text (also as UTF-8 bytes), number, list of texts, or list of structs
    with `answer`. A list may also be text, in JSON or as Python writes it; empty text, an empty list and null are no
    reference."""
    metrics: list[MetricName] = Field(default_factory=lambda: ["exact_match"])
    """Metrics of rows for which `tasks` and `metric_column` name none; a row's first metric is its score."""
    task_column: str | None = None
    """Column that names the row's task; scores are shown for each."""
    tasks: dict[str, list[MetricName]] = Field(default_factory=dict)
    """Metrics by task."""
    metric_column: str | None = None
    """Column with the row's own metrics, a list or text separated by commas; overrides `metrics` and `tasks`."""
    choices: str | None = None
    """Column with the list of options, for multiple choice; the list may be text."""
    cluster: str | None = None
    """Column whose equal values mark rows that belong together, such as the video of several questions: intervals and
    tests count these groups in place of rows. The configs of published sets name it."""
    slices: list[str] = Field(default_factory=lambda: ["media_kind", "resolution_bucket"])
    """Columns for whose values scores are shown separately; also media_kind, num_media and resolution_bucket."""
    num_samples: Positive = 1_000
    """Bootstrap samples for the interval of each corpus score."""
    seed: NotNegative = 0
    """Seed of bootstrap, permutation test and the choice of rows in the report."""

    @model_validator(mode="after")
    def _has_a_metric(self) -> ScoringSettings:
        if not self.named_metrics and not self.metric_column:
            raise ValueError("no metric; set evaluate.metrics, evaluate.tasks or evaluate.metric_column")
        return self

    @property
    def named_metrics(self) -> list[str]:
        """In the config's order, each once."""
        return list(dict.fromkeys([*self.metrics, *chain.from_iterable(self.tasks.values())]))

    @property
    def possible_metrics(self) -> list[str]:
        """Those that may occur: each has a column in the score rows. The first is the headline."""
        others = METRICS if self.metric_column else ()
        return list(dict.fromkeys([*self.named_metrics, *others]))

    @property
    def columns(self) -> dict[str, str]:
        """The user's columns that the result rows must have, each with the setting that names it first."""
        settings = ("references", "task_column", "metric_column", "choices", "cluster")
        named = [(getattr(self, setting), setting) for setting in settings]
        named += [(name, "slices") for name in self.slices if name not in DERIVED_SLICES]
        found: dict[str, str] = {}
        for name, setting in named:
            if name:
                found.setdefault(name, f"evaluate.{setting}")
        return found


class EvaluateSection(ScoringSettings):
    """What is right, and how it is scored."""

    baseline: str | None = None
    """Run folder to compare with, row by row."""
    canaries: NotNegative = 0
    """Run this many rows from the manifest's start once more, each alone, and report whether their answers agree."""
    layout: Layout | None = None
    """How a published dataset's columns become questions; without it the manifest is used as it is."""
    manifest_path: str | None = None
    """Where the manifest made by the layout is written. Default: beside the output folder."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Price from which the report computes the run's cost."""
    currency: str = "$"
    """Currency symbol."""
    thumbnails: bool = True
    """Whether the report shows pictures."""

    @property
    def scoring(self) -> ScoringSettings:
        """The settings for the scorer. A layout brings its own columns."""
        values = {name: getattr(self, name) for name in ScoringSettings.model_fields}
        if self.layout:
            values["references"] = "reference"
            if self.layout.task:
                values["task_column"] = "task"
            if self.layout.choices:
                values["choices"] = "choices"
        return ScoringSettings(**values)
