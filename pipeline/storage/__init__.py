"""Files on disk or in a bucket: read, list, publish atomically.

    paths        the parts of a path
    read         open, list, download
    write        publish, create, delete
    buckets      the border to fsspec
    retry        pauses between attempts, and which faults are worth one
    credentials  whether a bucket refuses the job's credentials

Local paths go straight to the operating system; any other URL (`s3://`, `gs://`, `hf://`, `memory://`, ...) goes
through fsspec with the caller's `storage_options`. Whatever goes wrong is an OSError here (FileNotFoundError,
PermissionError, StorageError); callers say what it means to them. Knows no formats and no rows.
"""

from pipeline.storage.buckets import EXTRAS, CredentialsRefused, StorageError, StorageOptions, file_system
from pipeline.storage.paths import (
    absolute,
    escaped,
    glob_base,
    is_glob,
    is_remote,
    join,
    local_path,
    name,
    parent,
    two_slashes,
)
from pipeline.storage.read import (
    FileInfo,
    download,
    exists,
    file_info,
    glob,
    is_dir,
    list_files,
    open_input,
    opened_info,
    read_bytes,
    read_tail,
)
from pipeline.storage.write import create, delete, delete_empty, make_dir, publish, publish_file, sweep

__all__ = [
    "EXTRAS", "CredentialsRefused", "FileInfo", "StorageError", "StorageOptions", "absolute", "create", "delete",
    "delete_empty", "download", "escaped", "exists", "file_info", "file_system", "glob", "glob_base", "is_dir",
    "is_glob", "is_remote", "join", "list_files", "local_path", "make_dir", "name", "open_input", "opened_info",
    "parent", "publish", "publish_file", "read_bytes", "read_tail", "sweep", "two_slashes",
]  # fmt: skip
