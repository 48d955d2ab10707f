"""The one door to files: uri -> filesystem, list, read, create-if-absent. Knows no images and no Parquet.

uris.py         a uri is a local path, `s3://bucket/key`, or another scheme that fsspec knows; parsed strictly
answers.py      what a store's error says, and what a user can do about it
retries.py      transient or permanent; how long to wait
connections.py  uri -> filesystem, with deadlines
listing.py      exists, stat_file, list_files, list_folders, list_names, expand
scanning.py     scan_files: many parts of a large folder listed at once, in no order
listed.py       listed files as a filesystem, for libraries that want one
files.py        read_bytes, open_for_reading, create, replace, publish, delete; the probe that a store honours create-if-absent
"""

from fcos_ray.storage.answers import cut_secrets, describe, remedy, store_answer
from fcos_ray.storage.connections import OPERATION_SECONDS, S3_CONFIG, filesystem, s3
from fcos_ray.storage.files import (
    create,
    delete,
    open_for_reading,
    probe_create_if_absent,
    publish,
    read_bytes,
    replace,
)
from fcos_ray.storage.listed import ListedFiles
from fcos_ray.storage.listing import StoredFile, exists, expand, list_files, list_folders, list_names, stat_file
from fcos_ray.storage.retries import (
    MAX_ATTEMPTS,
    STORE_ERRORS,
    backoff_seconds,
    is_transient,
    retrying,
)
from fcos_ray.storage.scanning import scan_files
from fcos_ray.storage.uris import (
    InvalidUri,
    Location,
    join,
    parent,
    parse_uri,
    secret_in,
    without_secrets,
    without_userinfo,
)

__all__ = [
    "MAX_ATTEMPTS",
    "OPERATION_SECONDS",
    "S3_CONFIG",
    "STORE_ERRORS",
    "InvalidUri",
    "ListedFiles",
    "Location",
    "StoredFile",
    "backoff_seconds",
    "create",
    "cut_secrets",
    "delete",
    "describe",
    "exists",
    "expand",
    "filesystem",
    "is_transient",
    "join",
    "list_files",
    "list_folders",
    "list_names",
    "open_for_reading",
    "parent",
    "parse_uri",
    "probe_create_if_absent",
    "publish",
    "read_bytes",
    "remedy",
    "replace",
    "retrying",
    "s3",
    "scan_files",
    "secret_in",
    "stat_file",
    "store_answer",
    "without_secrets",
    "without_userinfo",
]
