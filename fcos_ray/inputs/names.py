"""Names of files: which of them globs mean, which a manifest can hold, and what key=value folders say. No I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

from fcos_ray.errors import ManifestError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.partitions import HIVE_NULL
from fcos_ray.inputs.resolve import resolve_uri

# What decode reads, by the endings in use.
IMAGE_GLOBS: Final = tuple(
    f"*.{ending}"
    for ending in (
        "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff",
    )
)  # fmt: skip
# Names without these are uris as they are; the others are looked at one by one, which takes 20 times as long.
_ODD: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff:@?]")
_TOKEN: Final = re.compile(r"\*+|\?|\[!?(?:\][^\]]*|[^\]]+)\]|.", re.DOTALL)
_HIVE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


class Names:
    """Names below a folder, held against globs and against what the plan of a manifest will take.

    Globs ignore case. One without `/` is held against a file's name, another against its path below the folder, where
    `*` and `?` stay within a folder and `**` means any number of folders. What is excluded is not included.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str], *, root: str) -> None:
        self._include, self._exclude = _any_of("--include", include), _any_of("--exclude", exclude)
        self._root = root
        # Both spellings, as a job has them: links in the folder's own name are followed when an image is read.
        self.allow_roots = () if root.startswith("s3://") else (root, os.path.realpath(root))
        self._policy = FetchPolicy(allow_roots=self.allow_roots)

    def fits(self, path: str) -> bool:
        """Whether a file at `path` below the folder is meant."""
        return self._include.fullmatch(path) is not None and self._exclude.fullmatch(path) is None

    def reason_to_refuse(self, uri: str) -> str | None:
        """Why a manifest cannot hold a uri, so that a plan of it would stop; None when it can."""
        if not _ODD.search(uri[5:] if uri.startswith("s3://") else uri):
            return None
        if any("\ud800" <= character <= "\udfff" for character in uri):
            return "the name is not UTF-8"
        resolved, reason = resolve_uri(uri, folder=self._root, policy=self._policy)
        return reason or (None if resolved == uri else f"it would be read as {resolved!r}")


def _any_of(flag: str, globs: Sequence[str]) -> re.Pattern[str]:
    patterns = []
    for glob in globs:
        try:
            patterns.append(re.compile(_glob_regex(glob)).pattern)
        except re.error as error:
            raise ManifestError(
                f"{flag} {glob}: wanted a glob such as *.jpg or day=*/**, got a bad one: {error}"
            ) from error
    return re.compile("|".join(patterns) or r"(?!)", re.IGNORECASE | re.DOTALL)


def _glob_regex(glob: str) -> str:
    parts = glob.lstrip("/").split("/")
    if parts[-1] == "":  # a folder: all that is in it
        parts[-1] = "**"
    if len(parts) == 1:
        parts = ["**", *parts]
    *folders, name = parts
    regex = "".join("(?:[^/]+/)*" if part == "**" else f"{_part_regex(part)}/" for part in folders)
    return regex + (".+" if name == "**" else _part_regex(name))


def _part_regex(part: str) -> str:
    def regex(token: str) -> str:
        if token[0] == "*":
            return "[^/]*"
        if token == "?":
            return "[^/]"
        if len(token) == 1:
            return re.escape(token)
        negated, inner = token[1] == "!", token[1:-1].removeprefix("!")
        # a set never stands for the / between folders; what re reads as more than a letter is taken literally
        literal = re.sub(r"([\[\]\\^&~|])", r"\\\1", inner)
        return f"(?!/)[{'^' * negated}{literal}]"

    return "".join(regex(token) for token in _TOKEN.findall(part))


def hive_values(folder: str) -> dict[str, str | None]:
    """The key=value parts of a relative path, decoded as readers of Hive paths do; the last of a key counts."""
    found = (_HIVE.fullmatch(part) for part in folder.split("/"))
    return {match[1]: None if match[2] == HIVE_NULL else unquote(match[2]) for match in found if match}
