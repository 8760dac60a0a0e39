"""The engine stage's stand-in for tests of the flow around it: result rows without a model.

Knows the result schema; what a row's answer is, and what else befalls, is for the tests that derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.schema import result_schema


class StandInStage:
    """What `flow.EngineActor` asks of its stage, save for the call itself."""

    def __init__(self, kept: pa.Schema) -> None:
        self._schema = result_schema(kept)

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
        return {"kind": "stand-in"}

    def stats(self) -> dict[str, float]:
        return {}
