"""An engine for benchmarks of everything around it: every request is answered, none is looked at.

Knows the flow's engine actor, which it leaves as it is, and the result schema; not what is measured with it.
"""

from __future__ import annotations

from typing import cast

import pyarrow as pa

from jobs.flow import EngineActor
from pipeline.errors import RowError
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.schema import result_schema


class AnswerAtOnceStage:
    """What `EngineActor` asks of its stage, without a model: results are the requests' own columns and nulls."""

    def __init__(self, kept: pa.Schema) -> None:
        self._schema = result_schema(kept)

    def describe(self) -> dict[str, str]:
        return {"kind": "answers at once"}

    def stats(self) -> dict[str, float]:
        return {}

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = [
            table.column(field.name) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
            for field in self._schema
        ]
        return pa.table(columns, schema=self._schema)

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """No row can crash this stage; one given up elsewhere ends the benchmark."""
        raise error


class AnswerAtOnce(EngineActor):
    """The real engine actor around the stage above; goes in the place of `flow.ENGINE_ACTOR`."""

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        return cast(GenerateStage, AnswerAtOnceStage(options.kept))
