"""An output that the job itself wrote, once for all tests that only read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fcos_ray as fr
from fcos_ray.sample import write_sample
from tests.analysis.written import SeveralBoxes
from tests.corpus import config


@dataclass(frozen=True)
class TwoRuns:
    """`folder`/out/labels: a partitioned run over a drawn corpus with broken images, then its first rows once more."""

    folder: Path
    manifest: Path
    summaries: tuple[fr.RunSummary, fr.RunSummary]

    @property
    def output(self) -> str:
        return str(self.folder / "out" / "labels")


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> TwoRuns:
    folder = tmp_path_factory.mktemp("two-runs")
    write_sample(folder / "corpus", num_images=24, seed=5, num_broken=6)
    manifest = folder / "corpus" / "manifest.parquet"
    settings = {"shard_rows": 8, "partition_by": ["captured_at"]}
    whole = config(manifest, folder / "out" / "labels", **settings)
    part = config(manifest, folder / "out" / "labels", **settings, limit=10, select=["all"])
    summaries = fr.run(whole, make_detector=SeveralBoxes), fr.run(part, make_detector=SeveralBoxes)
    return TwoRuns(folder, manifest, summaries)
