"""Which rows a run folder already answers, and which of them failed: what a resumed run starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest.row_set import Indices, RowNumbering, RowSet
from pipeline.manifest.work import Retries
from pipeline.results.result_files import (
    count_values,
    is_answered,
    read_in_order,
    read_table,
    row_indices,
    winners,
)
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

_STATE_COLUMNS = (MANIFEST_FILE, MANIFEST_ROW, "status", "error_type", "attempts")
_FAILED_SCHEMA = pa.schema(
    [("index", pa.int64()), ("error_type", pa.dictionary(pa.int32(), pa.string())), ("attempts", pa.int32())]
)


@dataclass
class FinishedRows:
    """Which rows have a result, and which of the results are errors."""

    done: RowSet
    failed: pa.Table
    """The latest attempt of each error row, 16 bytes a row: index (ascending), error_type, attempts."""

    def take_failed(self, error_types: Sequence[str] | None) -> Retries:
        """Remove the error rows of these types (None: all) from the finished ones, to be run again."""
        chosen = pa.repeat(True, self.failed.num_rows)
        if error_types is not None:
            chosen = pc.is_in(self.failed.column("error_type"), value_set=pa.array(error_types, pa.string()))
        taken, self.failed = self.failed.filter(chosen), self.failed.filter(pc.invert(chosen))
        retries = Retries(taken.column("index").to_numpy(), taken.column("attempts").to_numpy())
        self.done.discard(retries.indices)
        return retries

    def count_failed(self) -> Counter[str]:
        """How many rows failed, by error type."""
        return count_values(self.failed.column("error_type"))


def read_finished(folder: RunFolder, numbering: RowNumbering) -> FinishedRows:
    """The rows in the folder's fragments, or in its parts once it is finished."""

    def read(path: str) -> tuple[Indices, npt.NDArray[np.bool_], pa.Table]:
        table = read_table(folder, path, _STATE_COLUMNS, encoded=("status", "error_type"))
        indices, answered = row_indices(table, numbering), is_answered(table)
        errors = table.append_column("index", pa.array(indices)).filter(pa.array(~answered))
        return indices, answered, errors.select(_FAILED_SCHEMA.names).cast(_FAILED_SCHEMA)

    done, answered_rows = RowSet(numbering.num_rows), RowSet(numbering.num_rows)
    failed = [_FAILED_SCHEMA.empty_table()]
    for indices, answered, errors in read_in_order(folder, read, folder.result_files()):
        done.add(indices)
        answered_rows.add(indices[answered])
        failed.append(errors)
    table = pa.concat_tables(failed).unify_dictionaries()
    indices = table.column("index").to_numpy()
    latest = winners(indices, np.zeros(len(indices), np.bool_), table.column("attempts").to_numpy())
    latest = latest[~answered_rows.has(indices[latest])]
    return FinishedRows(done, table.take(pa.array(latest)).combine_chunks())
