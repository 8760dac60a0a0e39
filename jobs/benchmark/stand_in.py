"""The engine stage's stand-in, for measuring and testing the flow around it: result rows without a model.

Knows the flow's engine actor, which it leaves as it is, and the result schema; what else befalls a row is for those
that derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.execution.actors import EngineActor
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.schema import result_schema


class StandInStage:
    """What `EngineActor` asks of its stage; answers every request at once and looks at none."""

    def __init__(self, kept: pa.Schema) -> None:
        self._schema = result_schema(kept)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Result rows (schema.result_schema) for request rows (schema.request_schema): what they had, and nulls."""
        return self.rows(table, {})

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """The rows as errors."""
        words = {
            "status": "error",
            "error_stage": error.stage,
            "error_type": type(error).__name__,
            "error_message": str(error),
        }
        return self.rows(table, {name: [word] * table.num_rows for name, word in words.items()})

    def rows(self, table: pa.Table, values: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Result rows: the values, what the requests brought, and nulls."""
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
        """Its kind."""
        return {"kind": "stand-in"}

    def stats(self) -> dict[str, float]:
        """No figures."""
        return {}


class AnswerAtOnce(EngineActor):
    """The real engine actor around the stage above; goes in the place of `dataset.ENGINE_ACTOR`."""

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        """The stand-in."""
        return cast(GenerateStage, StandInStage(options.kept))
