"""Servers and clusters that tests share: a real S3 (Ceph RGW) and a local Ray, one of each per session."""

from __future__ import annotations

import gc
import os
import signal

# Before anything imports Ray or botocore.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("AWS_CONFIG_FILE", os.devnull)
os.environ.setdefault("AWS_SHARED_CREDENTIALS_FILE", os.devnull)

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import hypothesis
import pytest

from tests.rgw import Credentials, RgwServer, missing_programs
from tests.s3_faults import S3Faults, Treat

REQUIRE_SERVERS = os.environ.get("FCOS_RAY_REQUIRE_SERVERS") == "1"
# The same examples on every machine; FCOS_RAY_FUZZ=20 tries twenty times as many, other ones each time.
_FUZZ = int(os.environ.get("FCOS_RAY_FUZZ", "0"))
hypothesis.settings.register_profile(
    "fcos_ray",
    max_examples=40 * (_FUZZ or 1),
    stateful_step_count=25,
    derandomize=not _FUZZ,
    deadline=None,  # other suites share the cores
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("fcos_ray")
_ORDER = ("s3", "ray", "chaos")  # pure tests first, the dearest last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "s3_server" in fixtures and "ray_session" not in fixtures:
            item.add_marker("s3")
        if "ray_session" in fixtures:
            item.add_marker("ray")
    items.sort(key=lambda item: max([_ORDER.index(m.name) + 1 for m in item.iter_markers() if m.name in _ORDER] or [0]))


def s3_environment(server: RgwServer, who: Credentials) -> dict[str, str]:
    """What a process needs to talk to the server as one of its users."""
    return {
        "AWS_ACCESS_KEY_ID": who.access_key,
        "AWS_SECRET_ACCESS_KEY": who.secret_key,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Ceph 16 does not know the checksums that newer clients send by default.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[RgwServer]:
    """The S3 server; this process, and what it starts from now on, is its user `owner`."""
    missing = missing_programs()
    if missing:
        reason = f"no {', '.join(missing)}: apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw"
        pytest.fail(reason) if REQUIRE_SERVERS else pytest.skip(reason)
    with RgwServer() as server, pytest.MonkeyPatch.context() as environment:
        for name, value in s3_environment(server, server.owner).items():
            environment.setenv(name, value)
        yield server


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """S3 clients are made anew, from the environment as it is then."""
    drop_s3_clients()
    yield
    drop_s3_clients()


def drop_s3_clients() -> None:
    """Ended here: collected while S3Faults' loop runs, s3fs would end them on that one, and asyncio logs an error."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


@pytest.fixture
def s3_faults(
    s3_server: RgwServer, monkeypatch: pytest.MonkeyPatch, fresh_client: None
) -> Iterator[Callable[..., S3Faults]]:
    """`s3_faults(treat, …)`: from here on this process, and what it starts, reaches the server through S3Faults only."""
    with ExitStack() as stack:

        def make(treat: Treat, **options: Any) -> S3Faults:
            proxy = stack.enter_context(S3Faults(s3_server.endpoint, treat, **options))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            drop_s3_clients()
            return proxy

        yield make


@pytest.fixture
def s3_bucket(s3_server: RgwServer) -> str:
    """A new, empty bucket, as a uri."""
    from fcos_ray import storage

    name = f"test-{uuid.uuid4().hex[:12]}"
    storage.s3().call_s3("create_bucket", Bucket=name, timeout=30)
    return f"s3://{name}"


@pytest.fixture
def own_signals() -> Iterator[None]:
    """What a job script called within this process does with signals ends with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def ray_session(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A local Ray with four logical CPUs. Its workers reach the S3 server too, when there is one."""
    import ray

    from fcos_ray.session import start_local_ray

    # Workers inherit the environment of ray.init, so the server comes first.
    if not missing_programs():
        request.getfixturevalue("s3_server")
    start_local_ray(num_cpus=4, configure_logging=False)
    yield ray
    ray.shutdown()
