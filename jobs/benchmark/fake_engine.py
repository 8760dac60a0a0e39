"""An engine stage that answers without a model, for measuring and testing everything around the engine.

Knows the engine stage and its actor, which it leaves as they are but for the engine itself. What a row's answer is, and
what happens to the process, can be changed by deriving from the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.execution.actors import EngineActor
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.schema import result_schema


class FakeGenerateStage(GenerateStage):
    """Answers every request at once, with nothing."""

    def __init__(self, kept: pa.Schema) -> None:
        self._schema = result_schema(kept)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Result rows (schema.result_schema) for request rows (schema.request_schema)."""
        return self.rows(table, {})

    def rows(self, table: pa.Table, values: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Result rows with these values by column, else with what the requests hold, else with nulls."""
        columns = []
        for field in self._schema:
            if field.name in values:
                columns.append(pa.array(values[field.name], field.type))
            elif field.name in table.column_names:
                columns.append(table.column(field.name))
            else:
                columns.append(pa.nulls(table.num_rows, field.type))
        return pa.table(columns, schema=self._schema)

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake"}

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to close."""


class FakeEngineActor(EngineActor):
    """The real engine actor around the stage above; goes in the place of `dataset.ENGINE_ACTOR`."""

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        return FakeGenerateStage(options.kept)
