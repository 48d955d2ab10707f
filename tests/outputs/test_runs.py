"""What a job does next on an output: the table of `resolve`, and the records it reads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.runs import (
    Existing,
    New,
    Nothing,
    Refuse,
    Request,
    Resume,
    RunState,
    State,
    history_digest,
    resolve,
)

OURS = "a" * 64
OTHER = "b" * 64
SETTINGS: dict[str, Any] = {"score_threshold": 0.2, "image_mean": [0.1, 0.2, 0.3]}
LABELLING: dict[str, Any] = {
    "architecture": "fcos", "weights": "COCO_V1", "weights_sha256": "1", "categories": ["a"], "settings": SETTINGS,
}  # fmt: skip


def run(number: int, digest: str = OURS, *, state: State = "finished", history: str | None = None) -> RunState:
    return RunState(f"{number:06d}-{digest[:8]}", digest, state, history)


# A request that is answered once for all ("always").
TABLE: dict[str, tuple[list[RunState], Any]] = {
    "no runs": ([], New("000001-aaaaaaaa")),
    "finished, same request": ([run(1)], Nothing("000001-aaaaaaaa")),
    "finished, other request": ([run(1, OTHER)], New("000002-aaaaaaaa")),
    "open, same request": ([run(1, state="open")], Resume("000001-aaaaaaaa")),
    "open, other request": ([run(1, OTHER, state="open")], Resume("000001-bbbbbbbb")),
    "several open: the oldest": ([run(2, state="open"), run(1, OTHER, state="open")], Resume("000001-bbbbbbbb")),
    "finished ours, open other": ([run(1), run(2, OTHER, state="open")], Resume("000002-bbbbbbbb")),
    "finished other, open ours": ([run(1, OTHER), run(2, state="open")], Resume("000002-aaaaaaaa")),
    "open before finished": ([run(1, OTHER, state="open"), run(2)], Resume("000001-bbbbbbbb")),
    "finished ours, then other": ([run(1), run(2, OTHER)], Nothing("000001-aaaaaaaa")),
    "finished twice: the last": ([run(1), run(2, OTHER), run(3)], Nothing("000003-aaaaaaaa")),
    "numbered after the last, whatever the order": ([run(10, OTHER), run(9, OTHER)], New("000011-aaaaaaaa")),
    "numbers with gaps": ([run(41, OTHER)], New("000042-aaaaaaaa")),
    "abandoned: what is missing is asked again": ([run(1, state="abandoned")], New("000002-aaaaaaaa")),
    "retracted: as if it had not been": ([run(1, state="retracted")], New("000002-aaaaaaaa")),
    "purged: its number stays taken": ([run(1), run(2, state="purged")], Nothing("000001-aaaaaaaa")),
}


@pytest.mark.parametrize("case", TABLE)
def test_resolve_is_this_table(case: str) -> None:
    existing, wanted = TABLE[case]
    request = Request(OURS, LABELLING, "always")
    assert resolve(Existing(tuple(existing)), LABELLING if existing else None, request) == wanted
    assert resolve(Existing(tuple(existing[::-1])), LABELLING, request) == wanted


FIRST = run(1, OTHER, history=history_digest([], []))
SECOND = run(2, history=history_digest([FIRST], []))
# The same request as SECOND's, which was planned against FIRST: is there anything to look for?
AGAIN: dict[str, tuple[Existing, Any]] = {
    "nothing has happened since": (Existing((FIRST, SECOND)), Nothing("000002-aaaaaaaa")),
    "the run before it was retracted": (Existing((run(1, OTHER, state="retracted"), SECOND)), New("000003-aaaaaaaa")),
    "the run before it was restored": (Existing((run(0, OTHER), FIRST, SECOND)), New("000003-aaaaaaaa")),
    "another run came after it": (Existing((FIRST, SECOND, run(3, OTHER))), New("000004-aaaaaaaa")),
    "one after it was retracted": (
        Existing((FIRST, SECOND, run(3, OTHER, state="retracted"))), Nothing("000002-aaaaaaaa"),
    ),
    "images were forgotten": (Existing((FIRST, SECOND), forgotten=("x.json",)), New("000003-aaaaaaaa")),
    "it was retracted itself": (Existing((FIRST, run(2, state="retracted"))), New("000003-aaaaaaaa")),
    "a record of older code": (Existing((FIRST, run(2))), New("000003-aaaaaaaa")),
}  # fmt: skip


@pytest.mark.parametrize("case", AGAIN)
def test_the_same_request_is_nothing_to_do_while_nothing_has_happened(case: str) -> None:
    existing, wanted = AGAIN[case]
    assert resolve(existing, LABELLING, Request(OURS, LABELLING)) == wanted


def test_a_request_for_what_time_may_mend_is_always_planned() -> None:
    existing = Existing((FIRST, SECOND))
    assert resolve(existing, LABELLING, Request(OURS, LABELLING, "never")) == New("000003-aaaaaaaa")


def test_a_number_that_was_taken_is_not_given_again() -> None:
    request = Request(OURS, LABELLING)
    assert resolve(Existing((FIRST,), claimed=("000002-cccccccc",)), LABELLING, request) == New("000003-aaaaaaaa")
    # the same request's: who was first may have died, or plans beside us
    assert resolve(Existing((FIRST,), claimed=("000002-aaaaaaaa",)), LABELLING, request) == New("000002-aaaaaaaa")
    # an old claim below another run: its rows would count as older than that run's
    existing = Existing((FIRST, run(3, OTHER)), claimed=("000002-aaaaaaaa",))
    assert resolve(existing, LABELLING, request) == New("000004-aaaaaaaa")


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
@pytest.mark.parametrize("existing", [[], [run(1)], [run(1, state="open")]])
def test_another_labelling_is_refused_naming_every_difference(case: str, existing: list[RunState]) -> None:
    changes, wanted = DIFFERENT[case]
    assert resolve(Existing(tuple(existing)), LABELLING, Request(OURS, LABELLING | changes)) == Refuse(wanted)


def test_the_same_weights_under_another_name_are_the_same_labelling() -> None:
    renamed = Request(OURS, LABELLING | {"weights": "/models/fcos.pth"})
    assert resolve(Existing(), LABELLING, renamed) == New("000001-aaaaaaaa")


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


def test_marks_say_a_runs_state(tmp_path: Path) -> None:
    output, run_id = str(tmp_path), "000001-aaaaaaaa"
    runs.create_run(output, run_id, {"request_digest": OURS, "history": "h"})
    assert runs.read_state(output, run_id) == run(1, state="open", history="h")
    for mark, state in {"_ABANDONED": "abandoned", "_SUCCESS": "finished", "_RETRACTED": "retracted"}.items():
        runs.create_mark(output, run_id, mark, {"at": "now"})  # type: ignore[arg-type]
        assert runs.read_state(output, run_id) == run(1, state=state, history="h")  # type: ignore[arg-type]
    runs.delete_mark(output, run_id, "_RETRACTED")
    assert runs.read_state(output, run_id) == run(1, history="h")
    with pytest.raises(OutputError, match=r"has no run '000009-aaaaaaaa'; its last runs: 000001-aaaaaaaa"):
        runs.require_run(output, "000009-aaaaaaaa")


def test_a_number_belongs_to_who_claims_it_first(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert runs.claim_number(output, "000001-aaaaaaaa")
    assert runs.claim_number(output, "000001-aaaaaaaa"), "the same request"
    assert not runs.claim_number(output, "000001-bbbbbbbb")
    assert runs.read_existing(output) == Existing((), ("000001-aaaaaaaa",), ())
    runs.create_run(output, "000001-aaaaaaaa", {"request_digest": OURS})
    assert runs.read_existing(output) == Existing((run(1, state="open"),), (), ())


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert runs.list_runs(output) == []
    runs.create_run(output, "000001-aaaaaaaa", {"request_digest": OURS})
    runs.create_run(output, "000002-bbbbbbbb", {"request_digest": OTHER})
    runs.create_success(output, "000001-aaaaaaaa", {"rows": 1})
    assert sorted(runs.list_runs(output), key=lambda r: r.run_id) == [run(1), run(2, OTHER, state="open")]
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
    assert runs.list_runs(output) == [run(1, state="open")]


def test_the_first_labelling_of_an_output_stays(output: str) -> None:
    assert runs.read_labelling(output) is None
    assert runs.create_labelling(output, LABELLING) == LABELLING
    assert runs.create_labelling(output, LABELLING | {"architecture": "other"}) == LABELLING
    assert runs.read_labelling(output) == LABELLING
