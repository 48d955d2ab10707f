"""What a job does next on an output: the table of `resolve`, and the records it reads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.runs import New, Nothing, Refuse, Request, Resume, RunState, resolve

OURS = "a" * 64
OTHER = "b" * 64
SETTINGS: dict[str, Any] = {"score_threshold": 0.2, "image_mean": [0.1, 0.2, 0.3]}
LABELLING: dict[str, Any] = {
    "architecture": "fcos", "weights": "COCO_V1", "weights_sha256": "1", "categories": ["a"], "settings": SETTINGS,
}  # fmt: skip


def run(number: int, digest: str = OURS, *, finished: bool = True) -> RunState:
    return RunState(f"{number:06d}-{digest[:8]}", digest, finished)


TABLE: dict[str, tuple[list[RunState], Any]] = {
    "no runs": ([], New("000001-aaaaaaaa")),
    "finished, same request": ([run(1)], Nothing("000001-aaaaaaaa")),
    "finished, other request": ([run(1, OTHER)], New("000002-aaaaaaaa")),
    "open, same request": ([run(1, finished=False)], Resume("000001-aaaaaaaa")),
    "open, other request": ([run(1, OTHER, finished=False)], Resume("000001-bbbbbbbb")),
    "several open: the oldest": ([run(2, finished=False), run(1, OTHER, finished=False)], Resume("000001-bbbbbbbb")),
    "finished ours, open other": ([run(1), run(2, OTHER, finished=False)], Resume("000002-bbbbbbbb")),
    "finished other, open ours": ([run(1, OTHER), run(2, finished=False)], Resume("000002-aaaaaaaa")),
    "open before finished": ([run(1, OTHER, finished=False), run(2)], Resume("000001-bbbbbbbb")),
    "finished ours, then other": ([run(1), run(2, OTHER)], Nothing("000001-aaaaaaaa")),
    "finished twice: the last": ([run(1), run(2, OTHER), run(3)], Nothing("000003-aaaaaaaa")),
    "numbered after the last, whatever the order": ([run(10, OTHER), run(9, OTHER)], New("000011-aaaaaaaa")),
    "numbers with gaps": ([run(41, OTHER)], New("000042-aaaaaaaa")),
}


@pytest.mark.parametrize("case", TABLE)
def test_resolve_is_this_table(case: str) -> None:
    existing, wanted = TABLE[case]
    assert resolve(existing, LABELLING if existing else None, Request(OURS, LABELLING)) == wanted
    assert resolve(existing[::-1], LABELLING, Request(OURS, LABELLING)) == wanted


DIFFERENT: dict[str, tuple[dict[str, Any], tuple[tuple[str, Any, Any], ...]]] = {
    "one setting": ({"settings": SETTINGS | {"score_threshold": 0.5}}, (("score_threshold", 0.2, 0.5),)),
    "two things": (
        {"architecture": "retina", "settings": SETTINGS | {"image_mean": [0.0] * 3}},
        (("architecture", "fcos", "retina"), ("image_mean", [0.1, 0.2, 0.3], [0.0] * 3)),
    ),
    "other weights": ({"weights_sha256": "2", "weights": "x.pth"}, (("weights_sha256", "1", "2"),)),
    "a new setting": ({"settings": SETTINGS | {"new": 1}}, (("new", None, 1),)),
    "a setting that went": ({"settings": {"score_threshold": 0.2}}, (("image_mean", [0.1, 0.2, 0.3], None),)),
    "categories": ({"categories": ["b"]}, (("categories", ["a"], ["b"]),)),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("existing", [[], [run(1)], [run(1, finished=False)]])
def test_another_labelling_is_refused_naming_every_difference(case: str, existing: list[RunState]) -> None:
    changes, wanted = DIFFERENT[case]
    assert resolve(existing, LABELLING, Request(OURS, LABELLING | changes)) == Refuse(wanted)


def test_the_same_weights_under_another_name_are_the_same_labelling() -> None:
    renamed = Request(OURS, LABELLING | {"weights": "/models/fcos.pth"})
    assert resolve([], LABELLING, renamed) == New("000001-aaaaaaaa")


def test_a_request_changes_with_its_sources_and_its_settings() -> None:
    source = {"uri": "s3://b/m.parquet", "num_bytes": 7, "version": "etag"}
    settings = {"limit": None, "columns": ["a"]}
    digest = runs.request_digest([source], settings)
    assert digest == runs.request_digest([dict(reversed(source.items()))], dict(reversed(settings.items())))
    others = [
        runs.request_digest([source | {name: value}], settings)
        for name, value in {"uri": "s3://b/n.parquet", "num_bytes": 8, "version": "other"}.items()
    ]
    others += [runs.request_digest([source, source], settings), runs.request_digest([], settings)]
    others += [runs.request_digest([source], settings | change) for change in ({"limit": 1}, {"columns": None})]
    assert len({digest, *others}) == len(others) + 1


# ---- records


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert runs.list_runs(output) == []
    runs.create_run(output, "000001-aaaaaaaa", {"request_digest": OURS})
    runs.create_run(output, "000002-bbbbbbbb", {"request_digest": OTHER})
    runs.create_success(output, "000001-aaaaaaaa", {"rows": 1})
    assert sorted(runs.list_runs(output), key=lambda r: r.run_id) == [run(1), run(2, OTHER, finished=False)]
    assert runs.read_success(output, "000001-aaaaaaaa") == {"rows": 1}
    assert runs.read_success(output, "000002-bbbbbbbb") is None
    assert runs.read_run(output, "000002-bbbbbbbb") == {"request_digest": OTHER}


def test_a_run_that_was_never_pinned_does_not_count(tmp_path: Path) -> None:
    storage.create(f"{tmp_path}/runs/000001-aaaaaaaa/manifest-abc/00000.parquet", b"x")
    storage.create(f"{tmp_path}/runs/notes/run.json", b"{}")
    assert runs.list_runs(str(tmp_path)) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"request_digest": 5}'])
def test_a_damaged_run_record_is_named(tmp_path: Path, content: bytes) -> None:
    storage.create(f"{tmp_path}/runs/000001-aaaaaaaa/run.json", content)
    with pytest.raises(OutputError, match=f"{tmp_path}/runs/000001-aaaaaaaa/run.json is damaged: "):
        runs.list_runs(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_labelling_is_named(tmp_path: Path, content: bytes) -> None:
    storage.create(f"{tmp_path}/labelling.json", content)
    with pytest.raises(OutputError, match=r"labelling\.json is damaged: "):
        runs.read_labelling(str(tmp_path))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_bucket")) if request.param == "s3" else str(tmp_path)


def test_of_racing_drivers_all_go_on_with_the_winners_record(output: str) -> None:
    kept: list[dict[str, Any]] = []
    start = threading.Barrier(5)

    def create(attempt: str) -> None:
        start.wait()
        kept.append(runs.create_run(output, "000001-aaaaaaaa", {"request_digest": OURS, "attempt": attempt}))

    threads = [threading.Thread(target=create, args=(f"manifest-{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 5
    assert all(record == kept[0] == runs.read_run(output, "000001-aaaaaaaa") for record in kept)
    assert runs.list_runs(output) == [run(1, finished=False)]


def test_the_first_labelling_of_an_output_stays(output: str) -> None:
    assert runs.read_labelling(output) is None
    assert runs.create_labelling(output, LABELLING) == LABELLING
    assert runs.create_labelling(output, LABELLING | {"architecture": "other"}) == LABELLING
    assert runs.read_labelling(output) == LABELLING
