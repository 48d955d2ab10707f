"""GuardedDecoder: whatever an image does to its decoder, the next good image decodes.

The functions named poison_* are the injected decoders: they run in the child.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from fcos_ray.errors import DecodeError, WorkerError
from fcos_ray.inputs import guard
from fcos_ray.inputs.decode import MAX_PIXELS, decode
from fcos_ray.inputs.guard import GuardedDecoder
from fcos_ray.types import Image


def saved(pixels: np.ndarray, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format_, **options)
    return buffer.getvalue()


GOOD_PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
GOOD = saved(GOOD_PIXELS)


# Poisons: the image's bytes say what happens.


def poison_decoder(data: bytes, **options: Any) -> Image:
    poison = POISONS.get(data)
    if poison is not None:
        poison()
    return decode(data, **options)


def _loop() -> None:
    while True:
        pass


def _loop_in_c() -> None:
    # Neither threads nor Python signal handlers run: the interpreter's lock is held inside one C call.
    sum(itertools.repeat(0))


def _eat() -> None:
    held = []
    while True:
        held.append(bytearray(2**26))


def _raise_odd() -> None:
    raise KeyError("no such thing")


def _raise_wrong_code() -> None:
    raise AssertionError("not_found is no decode code")


def _print_much() -> None:
    for stream in (1, 2):
        for _ in range(100):
            os.write(stream, bytes(2**16))


def _close_the_socket_and_hang() -> None:
    os.close(0)
    _loop()


def _lie(answer: bytes) -> Callable[[], None]:
    def lie() -> None:
        socket.socket(fileno=os.dup(0)).send(answer)
        time.sleep(1000)

    return lie


def _say_environment() -> None:
    words = [Path("/proc/self/environ").read_bytes().decode(), " ".join(os.environ), " ".join(map(str, sys.argv))]
    raise DecodeError("corrupt", "\n".join(words).replace("\0", "\n")[:100_000])


def _say_limits() -> None:
    memory = resource.getrlimit(resource.RLIMIT_AS)[0]
    raise DecodeError(
        "corrupt", json.dumps([memory, resource.getrlimit(resource.RLIMIT_CORE)[0], threading.active_count()])
    )


POISONS: dict[bytes, Callable[[], None]] = {
    b"loop": _loop,
    b"loop in C": _loop_in_c,
    b"sleep": lambda: time.sleep(1000),
    b"stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    b"eat": _eat,
    b"segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"exit": lambda: os._exit(3),
    b"sys.exit": lambda: sys.exit(4),
    b"odd": _raise_odd,
    b"assert": _raise_wrong_code,
    b"print": _print_much,
    b"close": _close_the_socket_and_hang,
    b"lie about the size": _lie(b'{"shape": [99999, 99999, 3], "height": 1, "width": 1, "orientation": 1}'),
    b"lie about the shape": _lie(b'{"shape": [-1, -1, 3], "height": 1, "width": 1, "orientation": 1}'),
    b"lie without words": _lie(b"[]"),
    b"lie in no language": _lie(b"\xff"),
    b"environment": _say_environment,
    b"limits": _say_limits,
}


def guarded(**options: Any) -> GuardedDecoder:
    return GuardedDecoder(max_pixels=MAX_PIXELS, decoder=f"{__name__}:poison_decoder", **options)


@pytest.fixture(scope="module")
def decoder() -> Iterator[GuardedDecoder]:
    with guarded(memory_bytes=2**28) as one:
        yield one


@pytest.fixture(scope="module")
def hasty() -> Iterator[GuardedDecoder]:
    """For poisons that hang; with room for a good image on a busy machine."""
    with guarded(deadline_seconds=1.0, memory_bytes=2**28) as one:
        yield one


@pytest.fixture(scope="module")
def patient() -> Iterator[GuardedDecoder]:
    """For poisons that end by themselves, however slow the machine is."""
    with guarded(deadline_seconds=120.0, memory_bytes=2**28) as one:
        yield one


def failure(decoder: GuardedDecoder, data: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decoder.decode(data)
    return caught.value


def child_of(decoder: GuardedDecoder) -> int:
    assert decoder._child is not None
    return decoder._child._process.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_running(pid)


# Good images


def test_a_guarded_image_is_the_plain_image() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    with GuardedDecoder(max_pixels=MAX_PIXELS) as decoder:
        for data in (GOOD, saved(GOOD_PIXELS, "JPEG", exif=exif)):
            image, plain = decoder.decode(data), decode(data)
            assert (image.pixels == plain.pixels).all()
            assert (image.height, image.width, image.orientation) == (plain.height, plain.width, plain.orientation)
            assert image.pixels.flags.writeable
            assert image.pixels.flags.c_contiguous


def test_an_image_stays_what_it_was_when_the_next_one_comes(decoder: GuardedDecoder) -> None:
    first = decoder.decode(GOOD)
    decoder.decode(saved(np.zeros((300, 300, 3), np.uint8)))
    assert (first.pixels == GOOD_PIXELS).all()


def test_one_child_decodes_them_all_large_and_small(decoder: GuardedDecoder) -> None:
    decoder.decode(GOOD)
    pid = child_of(decoder)
    large = np.random.default_rng(1).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)  # 27 MB there, 27 MB back
    for pixels in (large, GOOD_PIXELS, large[:1, :1], large[:2000]):
        assert (decoder.decode(saved(pixels, compress_level=0)).pixels == pixels).all()
    assert child_of(decoder) == pid


def test_the_memory_of_a_huge_image_is_given_back(decoder: GuardedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "KEEP_BYTES", 10_000)
    decoder.decode(saved(np.zeros((500, 500, 3), np.uint8)))
    decoder.decode(saved(np.zeros((2, 2, 3), np.uint8)))
    assert decoder._child is not None
    assert decoder._child._memory.num_bytes < 10_000


def test_errors_of_the_image_keep_their_code_and_the_child(decoder: GuardedDecoder) -> None:
    decoder.decode(GOOD)
    pid = child_of(decoder)
    for data, code in ((b"", "empty"), (b"x", "unknown_format"), (GOOD[:200], "corrupt")):
        assert failure(decoder, data).code == code
    assert child_of(decoder) == pid


def test_max_pixels_reaches_the_child() -> None:
    with GuardedDecoder(max_pixels=40 * 60 - 1) as decoder:
        assert failure(decoder, GOOD).code == "too_many_pixels"


# Poisons


@pytest.mark.parametrize(
    ("poison", "code", "message"),
    [
        (b"loop", "decode_timeout", "1 s"),
        (b"loop in C", "decode_timeout", "1 s"),
        (b"sleep", "decode_timeout", "1 s"),
        (b"stop", "decode_timeout", "1 s"),
        (b"eat", "decode_memory", "268435456"),
        (b"segfault", "decode_crash", "SIGSEGV"),
        (b"kill", "decode_crash", "SIGKILL"),
        (b"exit", "decode_crash", "exit code 3"),
        (b"sys.exit", "decode_crash", "exit code 4"),
        (b"odd", "decode_crash", "KeyError: 'no such thing'"),
        (b"lie about the size", "decode_crash", "says it wrote {'shape': [99999, 99999, 3]"),
        (b"lie about the shape", "decode_crash", "says it wrote {'shape': [-1, -1, 3]"),
        (b"lie without words", "decode_crash", "answers b'[]'"),
        (b"lie in no language", "decode_crash", "answers b'\\xff'"),
        (b"assert", "decode_crash", "AssertionError: not_found is no decode code"),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_after_a_poison_the_next_good_image_decodes(
    hasty: GuardedDecoder, patient: GuardedDecoder, poison: bytes, code: str, message: str
) -> None:
    decoder = hasty if code == "decode_timeout" else patient
    decoder.decode(GOOD)
    pid = child_of(decoder)
    error = failure(decoder, poison)
    assert error.code == code
    assert message in error.message
    assert not is_running(pid)
    assert (decoder.decode(GOOD).pixels == GOOD_PIXELS).all()


def test_a_decoder_that_prints_without_end_blocks_nothing(decoder: GuardedDecoder) -> None:
    assert failure(decoder, b"print").code == "unknown_format"
    assert decoder._child is not None
    assert os.fstat(decoder._child._errors.fileno()).st_size < 2**16  # nor does it pile up in memory


def test_a_child_that_cuts_the_line_and_hangs_is_ended(
    decoder: GuardedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "EXIT_SECONDS", 0.1)
    assert "SIGKILL" in failure(decoder, b"close").message
    assert (decoder.decode(GOOD).pixels == GOOD_PIXELS).all()


def test_a_decoder_that_needs_more_memory_than_allowed_is_stopped_by_a_real_image() -> None:
    """60 Mpx in one colour are a file of 200 kB; decoded they are 240 MB."""
    data = saved(np.zeros((6000, 10_000), np.uint8))
    with GuardedDecoder(max_pixels=MAX_PIXELS, memory_bytes=10**8) as decoder:
        assert failure(decoder, data).code == "decode_memory"
        assert (decoder.decode(GOOD).pixels == GOOD_PIXELS).all()


def test_the_limits_are_set() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        with guarded(memory_bytes=2**28) as decoder:
            memory, core, threads = json.loads(failure(decoder, b"limits").message)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert 2**28 < memory < 2**28 + 2**29  # the idle child itself has mapped some 110 MB
    assert (core, threads) == (0, 1)


def test_an_image_is_tried_again_when_its_child_was_killed_from_outside(hasty: GuardedDecoder) -> None:
    """The kernel's out-of-memory killer, say. Once: an image whose child is killed twice is to blame."""
    killed: list[int] = []

    def kill() -> None:
        hasty.decode(GOOD)
        pid = child_of(hasty)
        timer = threading.Timer(0.3, lambda: (killed.append(pid), os.kill(pid, signal.SIGKILL)))
        timer.start()
        assert failure(hasty, b"sleep").code == "decode_timeout"  # the second child's: the first was killed before
        timer.join()

    kill()
    assert killed


def test_a_child_killed_while_idle_is_replaced_without_a_word(decoder: GuardedDecoder) -> None:
    decoder.decode(GOOD)
    pid = child_of(decoder)
    os.kill(pid, signal.SIGTERM)
    assert wait_until_gone(pid, seconds=10)
    assert (decoder.decode(GOOD).pixels == GOOD_PIXELS).all()


def test_a_signal_handler_that_raises_leaves_no_stale_answer(hasty: GuardedDecoder) -> None:
    hasty.decode(GOOD)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            hasty.decode(b"sleep")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (hasty.decode(GOOD).pixels == GOOD_PIXELS).all()


def test_ctrl_c_is_none_of_the_childs_business(decoder: GuardedDecoder) -> None:
    decoder.decode(GOOD)
    pid = child_of(decoder)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    decoder.decode(GOOD)
    assert child_of(decoder) == pid


def test_a_decoder_that_cannot_be_loaded_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "START_ATTEMPTS", 1)
    decoder = GuardedDecoder(max_pixels=1, decoder="no_such_module:decode")
    with pytest.raises(WorkerError, match="No module named 'no_such_module'"):
        decoder.decode(GOOD)


# What reaches the child


def test_the_alarm_of_an_image_does_not_end_an_idle_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ALARM_MARGIN_SECONDS", -19.5)
    with guarded() as decoder:
        decoder.decode(GOOD)
        assert not wait_until_gone(child_of(decoder), seconds=1)


def test_no_credentials_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "GITHUB_TOKEN", "HOME")
    for name in secrets:
        monkeypatch.setenv(name, f"hunter2-{name}")
    with guarded() as decoder:
        said = failure(decoder, b"environment").message
    assert "PYTHONPATH" in said
    assert "hunter2" not in said
    assert not [name for name in secrets if name in said]


def test_the_package_is_found_through_sys_path_alone(tmp_path: Path) -> None:
    """As in a Ray worker with a working_dir: neither installed nor in the environment, but in sys.path."""
    (tmp_path / "only_here.py").write_text("from fcos_ray.inputs.decode import decode as odd_decode\n")
    sys.path.append(str(tmp_path))
    try:
        with GuardedDecoder(max_pixels=MAX_PIXELS, decoder="only_here:odd_decode") as decoder:
            assert decoder.decode(GOOD).width == 60
    finally:
        sys.path.remove(str(tmp_path))


def test_a_module_in_the_working_directory_does_not_get_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('wrong numpy')")
    monkeypatch.chdir(tmp_path)
    with GuardedDecoder(max_pixels=MAX_PIXELS) as decoder:
        assert decoder.decode(GOOD).width == 60


# Lives and deaths


@pytest.mark.parametrize("work", ["", "loop in C", "stop"])
def test_the_child_is_gone_when_its_parent_is_killed(work: str) -> None:
    """Idle: by end-of-file. In a hang: by the alarm. (A stopped process gets the alarm, but dies when it is continued.)"""
    code = textwrap.dedent(f"""
        import sys, threading
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
        from fcos_ray.inputs import guard
        guard.ALARM_MARGIN_SECONDS = -19
        decoder = guard.GuardedDecoder(max_pixels=10**6, deadline_seconds=20, decoder="test_guard:poison_decoder")
        import test_guard
        thread = threading.Thread(target=decoder.decode, args=(test_guard.GOOD,))
        thread.start()
        thread.join()  # the child was started by a thread that is no more
        decoder.decode(test_guard.GOOD)
        print(test_guard.child_of(decoder), flush=True)
        decoder.decode({work.encode()!r}) if {bool(work)} else sys.stdin.read()
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdin is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    if work == "stop":
        os.kill(child, signal.SIGCONT)
    assert wait_until_gone(child, seconds=10)


def test_fifty_deaths_leave_no_zombie_and_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os\ndef die(data, **options): os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with GuardedDecoder(max_pixels=1, decoder="dying:die") as decoder:
        failure(decoder, GOOD)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(50):
            assert failure(decoder, GOOD).message.endswith("exit code 3")
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    assert not [pid for pids in children for pid in pids if not is_running(int(pid))]


def test_a_decoder_that_is_closed_or_forgotten_takes_its_child_along() -> None:
    decoder = guarded()
    decoder.decode(GOOD)
    first = child_of(decoder)
    decoder.close()
    decoder.close()
    assert not is_running(first)
    decoder.decode(GOOD)  # closed is not the end: it starts again
    second, reference = child_of(decoder), weakref.ref(decoder)
    del decoder
    assert reference() is None
    assert not is_running(second)


def test_threads_take_turns_and_get_their_own_image(decoder: GuardedDecoder) -> None:
    wrong: list[int] = []

    def work(shade: int) -> None:
        pixels = np.full((20 + shade, 30, 3), shade, np.uint8)
        for _ in range(20):
            if not np.array_equal(decoder.decode(saved(pixels)).pixels, pixels):
                wrong.append(shade)

    threads = [threading.Thread(target=work, args=(shade,)) for shade in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Garbage


def test_garbage_is_an_error_at_once(decoder: GuardedDecoder) -> None:
    rng = np.random.default_rng(5)
    heads = [
        b"",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"RIFF\x10\0\0\0WEBPVP8L",
    ]
    start = time.monotonic()
    for round_ in range(80):
        assert failure(decoder, heads[round_ % len(heads)] + rng.bytes(2000)).code in (
            "unknown_format",
            "corrupt",
            "too_many_pixels",
            "decode_memory",
        )
    assert time.monotonic() - start < 10


def outcome(decode_: Callable[[bytes], Image], data: bytes) -> np.ndarray | str:
    """Pixels or an error's code."""
    try:
        return decode_(data).pixels
    except DecodeError as error:
        return error.code


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place, way = int(rng.integers(len(changed))), rng.random()
        if way < 0.5:
            changed[place] = int(rng.integers(256))
        elif way < 0.7:
            del changed[place : place + int(rng.integers(1, 20))]
        elif way < 0.9:
            changed[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            del changed[max(64, place) :]
    return bytes(changed)


def test_300_mutated_images_give_an_error_or_the_pixels_of_a_plain_decode(decoder: GuardedDecoder) -> None:
    rng = np.random.default_rng(300)
    grey = GOOD_PIXELS[:, :, 0]
    seeds = [GOOD, saved(grey, "TIFF", compression="tiff_lzw"), saved(GOOD_PIXELS, "WEBP"), saved(grey, "GIF")]
    seeds += [saved(GOOD_PIXELS, "JPEG"), saved(GOOD_PIXELS, "JPEG", progressive=True), saved(GOOD_PIXELS, "BMP")]
    outcomes = {"same": 0, "error": 0}
    for turn in range(300):
        data = mutated(rng, seeds[turn % len(seeds)])
        plain, guarded_ = outcome(decode, data), outcome(decoder.decode, data)
        if isinstance(plain, str) or isinstance(guarded_, str):
            assert plain == guarded_
            outcomes["error"] += 1
        else:
            assert np.array_equal(plain, guarded_)
            outcomes["same"] += 1
    assert min(outcomes.values()) > 50, outcomes
