"""The manifest: find and fingerprint it, plan and read units of its rows.

    path --find.open_manifest--> Manifest --work.plan_work--> Work ... --work.read_works--> tables of those rows

A row's identity is its row key: (number of the file, number of the row in it). Knows the file formats and their row
counts; not what the columns mean, nor anything of media, prompts or results.

How a path is understood:
- A file goes by its suffix: Parquet (.parquet, .pq), JSONL (.jsonl, .ndjson), CSV (.csv, .tsv); text files may be
  gzipped (.gz). An image or video alone is a manifest of one row.
- A folder, bucket prefix or glob holds files of one of these formats, or media. Where data files and media lie
  together, the data files directly in the folder are the manifest if their columns can ask something, since they most
  likely name the media; data files deeper down beside media are ignored. Two formats of data files
  are refused: only the user knows which is meant.
- Files and folders whose names begin with a dot are skipped, and data files that begin with an underscore
  (`_SUCCESS`, `_metadata`).
- A manifest without rows is fine: its job ends with zero rows. A folder without usable files is an error.

Folders such as `year=2024` give the rows below them a column.

Columns per format:
- Parquet keeps its types; files of a folder are unified (missing column: null; wider number wins).
- JSONL keeps bool, int, float, string and flat lists of these, decided over all rows of all files, so that a column
  has one type in every unit. Anything else (objects, nested or mixed values, integers beyond 2^53 among floats,
  `messages`) becomes a JSON string, with strings left as they are.
- CSV has strings only, exactly as they are written; an empty field is null.
- A line that can't be read (not JSON, too many fields) is still a row: all null, the reason in `_manifest_error`.
- A text with half a character (`\\ud800`) is null, and the reason is in its row's `_manifest_error`.
"""
