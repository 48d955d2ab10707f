"""Drivers that crash anywhere, race on one output and commit long after they died: no row lost or doubled, no file changed."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import audit
from fcos_ray.outputs.commit import ShardTarget, commit_shard, list_committed
from fcos_ray.outputs.schema import RESULT_SCHEMA

LABELLING: dict[str, Any] = {"weights_sha256": "1", "categories": ["__background__", "a"], "settings": {}}
REQUESTS = {"a" * 64: [f"a{i}" for i in range(5)], "b" * 64: [f"b{i}" for i in range(3)]}  # and the ids they label
SHARD_ROWS = {"a" * 64: (2, 2, 1), "b" * 64: (2, 1)}


@dataclass(eq=False)
class Driver:
    """One job, as job.py goes: look, plan, create labelling.json, look again, claim, pin, commit, audit, finish."""

    name: str
    request: str
    step: str = "look"
    run_id: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    to_commit: list[int] = field(default_factory=list)


def planned_ids(record: dict[str, Any], shard: int) -> list[str]:
    """The plan of an attempt: every attempt orders the rows otherwise."""
    digest, turn = record["request_digest"], record["attempt"]
    ids = REQUESTS[digest]
    ordered = ids[turn % len(ids) :] + ids[: turn % len(ids)]
    start = sum(SHARD_ROWS[digest][:shard])
    return ordered[start : start + SHARD_ROWS[digest][shard]]


class Outputs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.output = tempfile.mkdtemp(prefix="runs-")
        self.drivers: list[Driver] = []
        self.zombies: list[Driver] = []
        self.seen: dict[str, bytes] = {}
        self.started = 0

    def teardown(self) -> None:
        try:
            self.one_driver_ends_it_all()
        finally:
            shutil.rmtree(self.output)

    @initialize(second=st.sampled_from(sorted(REQUESTS)))
    def two_drivers_start(self, second: str) -> None:
        self.start("a" * 64)
        self.start(second)

    @precondition(lambda self: len(self.drivers) < 3)
    @rule(request=st.sampled_from(sorted(REQUESTS)))
    def another_driver_starts(self, request: str) -> None:
        self.start(request)

    def start(self, request: str) -> Driver:
        self.started += 1
        driver = Driver(f"driver{self.started}", request)
        self.drivers.append(driver)
        return driver

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def one_step(self, data: st.DataObject) -> None:
        driver = data.draw(st.sampled_from(range(len(self.drivers))))
        self.advance(self.drivers[driver], data.draw(st.integers(0, 2)))

    @precondition(lambda self: len(self.drivers) > 1)
    @rule(which=st.integers(0, 2), steps=st.integers(1, 4), order=st.sampled_from([1, -1]))
    def all_go_in_step(self, which: int, steps: int, order: int) -> None:
        for _ in range(steps):
            for driver in self.drivers[::order]:
                self.advance(driver, which)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def many_steps(self, data: st.DataObject) -> None:
        driver = self.drivers[data.draw(st.sampled_from(range(len(self.drivers))))]
        for _ in range(6):
            if driver in self.drivers:
                self.advance(driver, 0)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """What it had under way may still arrive."""
        self.zombies.append(self.drivers.pop(data.draw(st.sampled_from(range(len(self.drivers))))))

    @precondition(lambda self: any(zombie.to_commit for zombie in self.zombies))
    @rule(data=st.data())
    def a_commit_of_the_dead_arrives(self, data: st.DataObject) -> None:
        late = [zombie for zombie in self.zombies if zombie.to_commit]
        zombie = late[data.draw(st.sampled_from(range(len(late))))]
        self.commit(zombie, zombie.to_commit.pop())

    def advance(self, driver: Driver, which: int) -> None:
        getattr(self, driver.step)(driver) if driver.step != "label" else self.label(driver, which)

    def resolved(self, driver: Driver) -> runs.Decision:
        labelling = runs.read_labelling(self.output)
        return runs.resolve(
            runs.read_existing(self.output), labelling, runs.Request(driver.request, LABELLING, "always")
        )

    def look(self, driver: Driver) -> None:
        decision = self.resolved(driver)
        if isinstance(decision, runs.Resume):
            self.begin(driver, runs.read_run(self.output, decision.run_id))
        elif isinstance(decision, runs.New):
            driver.run_id, driver.step = decision.run_id, "create_labelling"
        else:
            assert isinstance(decision, runs.Nothing)
            self.drivers.remove(driver)

    def create_labelling(self, driver: Driver) -> None:
        runs.create_labelling(self.output, LABELLING)
        driver.step = "look_again"

    def look_again(self, driver: Driver) -> None:
        driver.step = "claim_number" if self.resolved(driver) == runs.New(driver.run_id) else "look"

    def claim_number(self, driver: Driver) -> None:
        driver.step = "create_run" if runs.claim_number(self.output, driver.run_id) else "look"

    def create_run(self, driver: Driver) -> None:
        attempt = int(driver.name.removeprefix("driver"))
        record = {"run_id": driver.run_id, "request_digest": driver.request, "attempt": attempt}
        self.begin(driver, runs.create_run(self.output, driver.run_id, record))

    def begin(self, driver: Driver, record: dict[str, Any]) -> None:
        committed = list_committed(self.output, record["run_id"])
        driver.record, driver.step = record, "label"
        driver.to_commit = [k for k in range(len(SHARD_ROWS[record["request_digest"]])) if k not in committed]

    def label(self, driver: Driver, which: int) -> None:
        if driver.to_commit:
            self.commit(driver, driver.to_commit.pop(which % len(driver.to_commit)))
        if not driver.to_commit:
            driver.step = "finish"

    def commit(self, driver: Driver, shard: int) -> None:
        ids = planned_ids(driver.record, shard)
        pinned = pa.table(
            {
                "image_id": ids,
                "uri": [f"/{i}.jpg" for i in ids],
                "__partition": [""] * len(ids),
                "__deleted": [False] * len(ids),
            }
        )
        row = {"shard": shard, "boxes": [], "labels": [], "scores": [], "attempts": 1, "content_etag": driver.name}
        results = pa.Table.from_pylist([row | {"row": n} for n in range(len(ids))], RESULT_SCHEMA)
        commit_shard(self.target(driver.record), shard, pinned=pinned, results=results)

    def target(self, record: dict[str, Any]) -> ShardTarget:
        return ShardTarget(self.output, record["run_id"], (), LABELLING)

    def finish(self, driver: Driver) -> None:
        counts = audit(self.target(driver.record), SHARD_ROWS[driver.record["request_digest"]])
        runs.create_success(self.output, driver.record["run_id"], {"rows": counts.rows, "by": driver.name})
        driver.step = "look" if driver.record["request_digest"] != driver.request else "done"
        if driver.step == "done":
            self.drivers.remove(driver)

    @invariant()
    def what_is_there_stays_as_it_is(self) -> None:
        there = {file.uri: storage.read_bytes(file.uri) for file in storage.list_files(self.output)}
        for uri, data in self.seen.items():
            assert there.get(uri) == data, f"{uri} changed"
        self.seen = there

    @invariant()
    def every_run_holds_rows_of_its_own_plan_once(self) -> None:
        for state in runs.list_runs(self.output):
            record = runs.read_run(self.output, state.run_id)
            files = list_committed(self.output, state.run_id)
            for shard, uri in files.items():
                assert pq.read_table(uri)["image_id"].to_pylist() == planned_ids(record, shard)
            if state.state == "finished":
                assert len(files) == len(SHARD_ROWS[state.request_digest]), "a finished run lost a shard"

    def one_driver_ends_it_all(self) -> None:
        for request in REQUESTS:
            driver = self.start(request)
            while driver in self.drivers:
                self.advance(driver, 0)
        for zombie in self.zombies + self.drivers:
            while zombie.to_commit:
                self.commit(zombie, zombie.to_commit.pop())
        self.what_is_there_stays_as_it_is()
        self.every_run_holds_rows_of_its_own_plan_once()
        existing = runs.list_runs(self.output)
        assert all(state.state == "finished" for state in existing)
        for request, ids in REQUESTS.items():
            done = [state for state in existing if state.request_digest == request]
            assert len(done) == 1, "one request, one run"
            assert len({state.run_id.split("-")[0] for state in existing}) == len(existing), "one number, one run"
            files = list_committed(self.output, done[0].run_id)
            assert sorted(i for uri in files.values() for i in pq.read_table(uri)["image_id"].to_pylist()) == ids


TestOutputs = Outputs.TestCase
# half of the usual number: each reads a folder of real files after every step
TestOutputs.settings = settings(max_examples=settings().max_examples // 2, stateful_step_count=15)


def test_the_machine_would_see_a_missing_shard(tmp_path: Path) -> None:
    machine = Outputs()
    driver = machine.start("b" * 64)
    for _ in range(6):
        machine.advance(driver, 0)
    committed = list_committed(machine.output, driver.run_id)
    assert len(committed) == 1
    with pytest.raises(OutputError, match="1 of 2 shards are missing"):
        machine.finish(driver)
    machine.teardown()
