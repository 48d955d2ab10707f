"""Whatever a uri is: read as one thing, refused by our own error, and never shown with its user information."""

from __future__ import annotations

import re

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fcos_ray import storage
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.resolve import resolve_uri, resolver

PIECES = st.sampled_from(
    ["s3://", "S3://", "s3a://", "file://", "file:///", "https://", "http://", "simplecache::", "::", ":", "/", "//", "..",
     ".", "../", "@", "user:pw@", "bucket", "my-bucket/", "a.jpg", "a b", "é", "%2e%2e/", "%2F", "%00", "\0", "\n", "\x7f",
     "?versionId=1", "?a=b", "#x", "\\", "~", "*", "[x]", "x" * 300, "day=2024/", "host:8080/", "[::1]", "://", "zip://"]
)  # fmt: skip
URIS = st.lists(PIECES, min_size=1, max_size=6).map("".join) | st.text(st.characters(codec="utf-8"), max_size=30)
FOLDERS = ("/data/corpus", "s3://bucket/corpus")
POLICIES = (
    FetchPolicy(allow_roots=("/data",)),
    FetchPolicy(),
    FetchPolicy(allow_roots=("/",), allow_schemes=("file",)),
)


@given(URIS)
def test_a_uri_is_parsed_or_refused_by_our_own_error(uri: str) -> None:
    try:
        location = storage.parse_uri(uri)
    except storage.InvalidUri:
        return
    assert "::" not in location.scheme
    assert "://" not in location.scheme
    if location.scheme == "file":
        assert location.path.startswith("/")
        assert ".." not in location.path.split("/")
    else:
        # On the web `::` may stand in a path, and within the brackets of an IPv6 address.
        web = location.scheme in ("http", "https")
        read_by_others = re.sub(r"\[[^/]*\]", "", location.path.split("/")[0]) if web else location.uri
        assert "::" not in read_by_others, "a chained uri went through"
        assert "@" not in location.path.split("/")[0], "user information went through"
    assert not any(ord(character) < 32 or ord(character) == 127 for character in location.path)
    # what stands in plans is read as the same place again (a `%` in a path is a `%`, not an escape)
    assert storage.parse_uri(location.uri) == location


@given(URIS, st.sampled_from(FOLDERS), st.sampled_from(POLICIES))
def test_a_resolved_uri_is_allowed_and_means_itself(uri: str, folder: str, policy: FetchPolicy) -> None:
    resolved, reason = resolve_uri(uri, folder=folder, policy=policy)
    if reason is not None:
        return
    location = storage.parse_uri(resolved)
    assert location.scheme in policy.allow_schemes
    if location.scheme == "file":
        assert any(location.path.startswith(root.rstrip("/") + "/") for root in policy.allow_roots)
    assert resolve_uri(resolved, folder="/elsewhere", policy=policy) == (resolved, None)


PASSWORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="@ \n\t\r", categories=["L", "N", "P", "S"]), max_size=8
).map(lambda text: f"se{text}cret")


@given(
    st.sampled_from(["s3://", "https://", "file://", "simplecache::s3://", "ftp://", "s3a://"]),
    PASSWORDS,
    st.sampled_from(["bucket/x.jpg", "host/a/b", "host:80/x", "host", "host/@/x", "bucket/a@2x.jpg"]),
    st.sampled_from(FOLDERS),
)
def test_user_information_is_in_nothing_that_is_shown(scheme: str, password: str, rest: str, folder: str) -> None:
    uri = f"{scheme}user:{password}@{rest}"
    shown, reason = resolve_uri(uri, folder=folder, policy=FetchPolicy(allow_roots=("/",)))
    assert reason is not None
    told = storage.describe(OSError(f"no answer from {uri} after 3 tries"))
    for words in (shown, reason, storage.without_userinfo(uri), storage.without_secrets(uri), told):
        assert password not in words
        assert "user:" not in words
    assert storage.secret_in(uri)


@given(st.lists(URIS | st.sampled_from(["a.jpg", "x/y.png", "s3://bucket/k.jpg"]), min_size=1, max_size=12), st.data())
def test_many_uris_at_once_get_the_answers_they_get_one_by_one(uris: list[str], data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(POLICIES))
    folders = {f"{folder}/m.parquet": folder for folder in FOLDERS}
    manifests = data.draw(st.lists(st.sampled_from(sorted(folders)), min_size=len(uris), max_size=len(uris)))
    found = resolver(folders, policy)(pa.chunked_array([uris], pa.string()), pa.chunked_array([manifests], pa.string()))
    wanted = [resolve_uri(u, folder=folders[m], policy=policy) for u, m in zip(uris, manifests, strict=True)]
    assert [(row["uri"], row["reason"]) for row in found.to_pylist()] == wanted
