"""The run folder: who writes to it, what it holds at every moment, and how its rows are read again.

    out/run/  part-00000.parquet         final: manifest order, every manifest row once
              _SUCCESS                   the parts are complete and their rows counted
              _report.html               a page about the run
              __run/run.json             settings, manifest fingerprint, versions, counts
                    manifest.parquet     the listing, where the input is a folder of media
                    fragments/*.parquet  finished rows, each file published whole; removed in the end
                    progress.jsonl       counts over time
                    errors.jsonl         the failed rows, one a line; written anew with the parts
                    .lease               the run that writes at the moment

With `partition_by`, parts lie one folder deeper, as in task=count/part-00000.parquet, without that column.

A row may be in several fragments, after a crash between publishing and bookkeeping or after a retry. It counts once:
an answer wins over an error, then the latest attempt. The last steps are: parts, count, `_SUCCESS`, run.json, and only
then are the fragments removed. A crash at any point leaves either fragments that hold every row, or `_SUCCESS`; so
parts without either have lost their `_SUCCESS`, and their rows are counted again.

Knows result rows and files; not how a row is answered.
"""
