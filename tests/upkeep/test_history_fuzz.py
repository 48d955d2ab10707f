"""Random lives of an output: nights, crashes, retractions, tombstones, forgets, purges, against a dictionary of the truth."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import fcos_ray as fr
from fcos_ray.analysis.audit import audit_output
from fcos_ray.outputs import runs
from fcos_ray.upkeep.forget import forget
from fcos_ray.upkeep.marks import abandon, restore, retract
from fcos_ray.upkeep.purge import plan_purge, purge
from tests.nights import Crash, run_night, write_night

IDS = [f"image-{n}" for n in range(8)]
SELECTS = [["new", "changed"], ["new", "changed", "failed"], ["new"], ["failed:all", "new"], ["all"]]


@dataclass
class Run:
    """What the truth knows of a run."""

    planned: dict[str, tuple[str, str]]  # image_id -> etag, outcome; of tombstones ("", "deleted")
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)  # of them, those that are committed
    state: str = "open"


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lives-"))
        self.output = str(self.folder / "out")
        self.corpus: dict[str, str] = {"image-0": "1"}
        self.failing: set[str] = set()
        self.runs: dict[str, Run] = {}
        self.gone: set[str] = set()  # forgotten and not in the corpus since

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # ---- what people do

    @rule(
        coming=st.sets(st.sampled_from(IDS), max_size=3),
        going=st.sets(st.sampled_from(IDS), max_size=2),
        failing=st.sets(st.sampled_from(IDS), max_size=3),
        crash=st.sampled_from([None, None, 0, 1]),
        select=st.sampled_from(SELECTS),
        tombstones=st.booleans(),
    )
    def the_corpus_moves_and_a_night_follows(
        self,
        coming: set[str],
        going: set[str],
        failing: set[str],
        crash: int | None,
        select: list[str],
        tombstones: bool,
    ) -> None:
        for image_id in sorted(coming):  # new, or changed
            self.corpus[image_id] = str(int(self.corpus.get(image_id, "0")) + 1)
        self.gone -= coming
        left = {i: etag for i, etag in self.corpus.items() if i not in going}
        self.corpus = left or self.corpus
        self.failing = failing
        self.night(select, tombstones, crash)

    @rule(select=st.sampled_from(SELECTS))
    def the_same_again(self, select: list[str]) -> None:
        self.night(select, False, None)

    def night(self, select: list[str], tombstones: bool, crash: int | None) -> None:
        manifest = write_night(self.folder / "m.parquet", self.corpus)
        open_run = self.open_run()
        failing = frozenset(self.failing)
        outcome = {i: "fetch_failed" if i in failing else "ok" for i in IDS}
        try:
            run_night(
                manifest, self.output, outcome=outcome.__getitem__, crash_after=crash, select=select,
                tombstones=tombstones, max_tombstone_fraction=1.0, shard_rows=2,
            )  # fmt: skip
        except Crash:
            crashed = True
        else:
            crashed = False
        self.look(select, tombstones, outcome, open_run, crashed=crashed)

    def look(
        self, select: list[str], tombstones: bool, outcome: dict[str, str], open_run: str | None, *, crashed: bool
    ) -> None:
        """Take down what was committed, and hold what was planned against what should have been."""
        for state in sorted(runs.list_runs(self.output), key=lambda run: run.run_id):
            if state.run_id not in self.runs:
                wanted = self.wanted(select, tombstones, outcome)
                self.runs[state.run_id] = Run(wanted)
                record = runs.read_run(self.output, state.run_id)
                assert record["num_rows"] == len(wanted), f"{state.run_id} was to take {sorted(wanted)}"
            run = self.runs[state.run_id]
            if run.state == "open":
                if state.run_id == open_run:  # what it had not committed is labelled as things are now
                    run.planned |= {
                        i: (etag, outcome[i]) for i, (etag, was) in run.planned.items()
                        if i not in run.rows and was != "deleted"
                    }  # fmt: skip
                committed = self.committed(state.run_id)
                assert committed.items() <= run.planned.items()
                assert run.rows.items() <= committed.items(), "what was committed stays"
                run.rows, run.state = committed, state.state
                assert run.state == "open" or committed == run.planned, "a finished run has every planned row"
        assert crashed or not self.open_run()

    def wanted(self, select: list[str], tombstones: bool, outcome: dict[str, str]) -> dict[str, tuple[str, str]]:
        known = self.newest(with_deleted=True)
        found = {}
        for image_id, etag in self.corpus.items():
            was_etag, was = known.get(image_id, ("", "deleted"))
            kind = (
                "new"
                if was == "deleted"
                else "changed"
                if was_etag != etag
                else "failed"
                if was != "ok"
                else "up to date"
            )
            takes = {"new": {"new"}, "changed": {"changed"}, "failed": {"failed", "failed:all"}, "up to date": set()}
            if (takes[kind] | {"all"}) & set(select):
                found[image_id] = (etag, outcome[image_id])
        if tombstones:
            found |= {i: ("", "deleted") for i, (_, was) in known.items() if i not in self.corpus and was != "deleted"}
        return found

    @precondition(lambda self: self.of("finished", "abandoned"))
    @rule(data=st.data())
    def one_is_retracted(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(self.of("finished", "abandoned")))
        retract(self.output, run_id)
        self.runs[run_id].state += " retracted"

    @precondition(lambda self: self.of("finished retracted", "abandoned retracted"))
    @rule(data=st.data())
    def one_is_restored(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(self.of("finished retracted", "abandoned retracted")))
        restore(self.output, run_id)
        self.runs[run_id].state = self.runs[run_id].state.removesuffix(" retracted")

    @precondition(lambda self: self.open_run())
    @rule()
    def the_open_one_is_abandoned(self) -> None:
        run_id = self.open_run()
        assert run_id is not None
        abandon(self.output, run_id, force=True)
        self.runs[run_id].state = "abandoned"

    @precondition(lambda self: self.runs)
    @rule()
    def the_retracted_are_purged(self) -> None:
        purge(plan_purge(self.output))
        for run_id in self.of("finished retracted", "abandoned retracted"):
            self.runs[run_id] = Run({}, {}, "purged")

    @precondition(lambda self: self.runs and not self.open_run())
    @rule(image_ids=st.sets(st.sampled_from(IDS), min_size=1, max_size=2), also_from_corpus=st.booleans())
    def some_are_forgotten(self, image_ids: set[str], also_from_corpus: bool) -> None:
        forget(self.output, image_ids, apply=True)
        for run in self.runs.values():
            run.rows = {i: row for i, row in run.rows.items() if i not in image_ids}
        if also_from_corpus and image_ids < self.corpus.keys():
            self.corpus = {i: etag for i, etag in self.corpus.items() if i not in image_ids}
        self.gone |= image_ids

    # ---- what must hold

    @invariant()
    def latest_is_the_truth(self) -> None:
        if not self.runs:
            return
        found = fr.open_dataset(self.output).latest(columns=["image_id", "content_etag", "status", "error_code"])
        rows = {
            row["image_id"]: (row["content_etag"], row["error_code"] or row["status"])
            for row in found.to_arrow().to_pylist()
        }
        assert rows == self.newest(with_deleted=False)
        audited = audit_output(self.output, deep=True)
        assert not audited.findings, audited.examples

    @invariant()
    def what_was_forgotten_is_nowhere(self) -> None:
        labelled_since = {i for run in self.runs.values() for i in run.rows}
        for image_id in self.gone - labelled_since - self.corpus.keys():
            for path in Path(self.output).rglob("*.parquet"):
                assert image_id.encode() not in path.read_bytes(), f"{image_id} is in {path}"

    def newest(self, *, with_deleted: bool) -> dict[str, tuple[str, str]]:
        rows: dict[str, tuple[str, str]] = {}
        for _, run in sorted(self.runs.items()):
            if run.state in ("open", "finished", "abandoned"):
                rows |= run.rows
        return rows if with_deleted else {i: row for i, row in rows.items() if row[1] != "deleted"}

    def committed(self, run_id: str) -> dict[str, tuple[str, str]]:
        columns = ["image_id", "content_etag", "status", "error_code"]
        rows = fr.open_dataset(self.output).rows(run_id, columns=columns).to_arrow().to_pylist()
        return {row["image_id"]: (row["content_etag"] or "", row["error_code"] or row["status"]) for row in rows}

    def of(self, *states: str) -> list[str]:
        return sorted(run_id for run_id, run in self.runs.items() if run.state in states)

    def open_run(self) -> str | None:
        return next(iter(self.of("open")), None)


TestLives = Lives.TestCase
# half of the usual number, of fewer steps: every step reads the whole output
TestLives.settings = settings(max_examples=settings().max_examples // 2, stateful_step_count=12)
