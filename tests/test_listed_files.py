"""Listed files as a filesystem: what was listed is there, whatever its name looks like, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fcos_ray.storage import ListedFiles, StoredFile, list_files


def test_only_what_was_listed_is_there(tmp_path: Path) -> None:
    for name in ("a", "b[1]*?", "p=%2F c"):
        (tmp_path / name).write_bytes(name.encode())
    listed = ListedFiles(list_files(str(tmp_path)))
    (tmp_path / "later").write_bytes(b"")
    for file in list_files(str(tmp_path)):
        uri, name = listed.uri(file), Path(file.uri).name
        there = name != "later"
        assert (listed.exists(uri), listed.glob(uri)) == (there, [file.uri] if there else [])
        if there:
            assert listed.open(uri).read() == name.encode()
            assert listed.info(uri)["size"] == listed.size(uri) == len(name)
            assert listed.modified(uri) == listed.modified(uri)
            continue
        for ask in (listed.open, listed.info, listed.modified):
            with pytest.raises(FileNotFoundError, match="later was not listed"):
                ask(uri)
    assert listed.glob(f"{listed.protocol}://{tmp_path}/*") == []


def test_every_listing_has_a_scheme_of_its_own_or_its_files() -> None:
    assert ListedFiles([]).protocol != ListedFiles([]).protocol
    file = StoredFile("s3://bucket/a [1]", 3, "etag")
    listed = ListedFiles([file], scheme="s3")
    assert (listed.protocol, listed.uri(file)) == ("s3", file.uri)
    assert listed.exists(file.uri)
