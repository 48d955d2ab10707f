"""Guard: runs a decoder in a child process with a deadline and a memory limit. Knows processes, not image formats.

Parent and child share a memory file (memfd, so Linux only) and a socket of small messages:

    parent                                          child
    bytes -> memory file; "length", the file  ──►   reads them all, decodes, pixels into a mapping of the file
    pixels in a mapping of the file           ◄──   {"shape": …, "height": …, "width": …, "orientation": …}
    raises DecodeError                        ◄──   {"code": …, "message": …}

Both send less than a socket's buffer, so neither can block the other; the parent waits no longer than the deadline,
then kills. The child gets no environment but what Python needs, so no credentials. It ends at end-of-file, that is when
the parent is gone, and in the middle of a decode by an alarm that the kernel delivers whatever loop it hangs in.
(PR_SET_PDEATHSIG would fire when the *thread* that started the child ends.) The file is sealed against shrinking: else a
child that some image has taken over could take pages away from under the parent's mapping, which kills it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fcos_ray.errors import DecodeError, WorkerError
from fcos_ray.types import Image

START_SECONDS: Final = 60.0  # a start takes 0.2 s; sixty when the machine is on its knees
START_ATTEMPTS: Final = 3
EXIT_SECONDS: Final = 5.0  # for a child that has cut the line to end
ALARM_MARGIN_SECONDS: Final = 5.0  # the parent kills at the deadline; the alarm is for children without a parent
KEEP_BYTES: Final = 64 * 2**20  # a memory file that one huge image made larger is thrown away after it
_ABOUT: Final = ("height", "width", "orientation")  # of an image, in an answer beside its shape
_MESSAGE_BYTES: Final = 64 * 1024
# The child's malloc keeps what it has: by default memory of 128 KiB goes back to the kernel with every image, and is zeroed
# again for the next. Decoding 640×480 3.9 -> 1.6 ms, 4000×3000 100 -> 72 ms (glibc 2.36, Pillow 13, a virtual machine).
_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20)}
# Where Python and its libraries are found, and how text is encoded. PYTHONPATH is made from sys.path.
_ENVIRONMENT: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "TMPDIR")


Use = Callable[[Image], NDArray[np.uint8]]  # an image in the decoder's memory -> pixels of the caller's own


def _copied(image: Image) -> NDArray[np.uint8]:
    return image.pixels.copy()


class GuardedDecoder:
    """Decodes in a child process, started with the first image and replaced when it dies. Threads take turns.

    `memory_bytes` is what decoding one image may take on top of the idle child: 12 bytes a pixel, WEBP 18 (libjpeg
    reports a lack of memory as damage, so a lower limit makes large progressive JPEGs `corrupt`).
    `model_size` is `decode`'s. `decoder` is `module:function` with decode's signature.
    """

    def __init__(
        self,
        *,
        max_pixels: int,
        deadline_seconds: float = 20.0,
        memory_bytes: int = 2 * 2**30,
        model_size: tuple[int, int] | None = None,
        decoder: str = "fcos_ray.inputs.decode:decode",
    ) -> None:
        alarm_seconds = deadline_seconds + ALARM_MARGIN_SECONDS
        self._settings = ChildSettings(decoder, max_pixels, memory_bytes, alarm_seconds, model_size)
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes, *, use: Use = _copied) -> Image:
        """As `decode.decode`; the pixels are the caller's own.

        `use` makes them from the decoder's image, which it must not keep: the next one overwrites it.

        Raises DecodeError: the decoder's codes, decode_timeout, decode_memory, decode_crash. Raises RuntimeError when
        no child can be started: that is no fault of the image.
        """
        with self._lock:
            try:
                child, answer = self._decode(data)
            except _Killed:
                # SIGKILL comes from outside (the kernel short of memory, an operator): the image gets a second chance.
                try:
                    child, answer = self._decode(data)
                except _Killed as error:
                    raise DecodeError("decode_crash", error.message) from error
            return child.image(answer, use)

    def _decode(self, data: bytes) -> tuple[_Child, dict[str, Any]]:
        if self._child is None or not self._child.alive():
            self._drop()
            self._child = _started(self._settings)
        try:
            answer = self._child.ask(data, self._deadline_seconds)
            if "code" in answer:
                raise DecodeError(answer["code"], answer["message"])
            self._child.require_image(answer)
            return self._child, answer
        except DecodeError as error:
            if error.code in ("decode_timeout", "decode_memory", "decode_crash"):
                self._drop()
            raise
        except BaseException:  # a signal handler that raises: an answer would be left in the socket for the next image
            self._drop()
            raise

    def _drop(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def close(self) -> None:
        """End the child. The next decode starts another."""
        with self._lock:
            self._drop()

    def __enter__(self) -> GuardedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Killed(DecodeError):
    """The child was killed by SIGKILL, not by us."""


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What the child is told on its command line."""

    decoder: str
    max_pixels: int
    memory_bytes: int
    alarm_seconds: float
    model_size: tuple[int, int] | None  # decode's


def _started(settings: ChildSettings) -> _Child:
    for attempt in range(START_ATTEMPTS):
        child = _Child(settings)
        trouble = child.wait_until_ready()
        if trouble is None:
            return child
        child.end()
        time.sleep(attempt)
    raise WorkerError(f"the decode child did not start, {START_ATTEMPTS} times, last: {trouble}")


class _Child:
    """The parent's side of one child process."""

    def __init__(self, settings: ChildSettings) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._memory = _Memory(_sealed_file())
        self._errors = FileIO(os.memfd_create("fcos_ray-stderr"), "r+")
        with theirs:
            self._process = subprocess.Popen(
                # -P: no module of the working directory gets in front of PYTHONPATH
                [sys.executable, "-P", "-m", "fcos_ray.inputs.guard", json.dumps(astuple(settings))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,  # until it is ready; then /dev/null, for libtiff and libjpeg talk without end
                env=_environment(),
                process_group=0,  # Ctrl-C in a terminal is for the parent, which decides what becomes of the child
            )
        self._end = weakref.finalize(self, _end, self._process, [self._channel, self._memory, self._errors])

    def wait_until_ready(self) -> str | None:
        """None, or what went wrong."""
        self._channel.settimeout(START_SECONDS)
        try:
            if self._channel.recv(_MESSAGE_BYTES):
                return None
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        code = self._exit_code()
        self._errors.seek(0)
        return f"{_death(code)}: {self._errors.read()[-2000:].decode(errors='replace').strip()}"

    def _exit_code(self) -> int:
        try:
            return self._process.wait(timeout=EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # it closed the socket and lives on
            self._process.kill()
            return self._process.wait()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, data: bytes, deadline_seconds: float) -> dict[str, Any]:
        """The child's answer. Raises DecodeError when there is none: the child is then dead or to be ended."""
        until = time.monotonic() + deadline_seconds
        try:
            if self._memory.num_bytes > KEEP_BYTES:
                self._memory.exchange(_sealed_file())
            self._memory.write(data)
            self._channel.settimeout(deadline_seconds)
            socket.send_fds(self._channel, [str(len(data)).encode()], [self._memory.file.fileno()])
            self._channel.settimeout(max(0.001, until - time.monotonic()))
            answer = self._channel.recv(_MESSAGE_BYTES)
        except TimeoutError as error:
            raise DecodeError("decode_timeout", f"not decoded within {deadline_seconds:g} s") from error
        except ConnectionError:
            answer = b""
        if not answer:
            code = self._exit_code()
            kind = _Killed if code == -signal.SIGKILL else DecodeError
            raise kind("decode_crash", f"the decoder's process died: {_death(code)}")
        try:
            said = json.loads(answer)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise DecodeError("decode_crash", f"the decoder's process answers {answer[:200]!r}")
        return said

    def require_image(self, answer: dict[str, Any]) -> None:
        """Raises DecodeError when what the child says cannot lie in the memory file: some image has taken it over."""
        numbers = [*answer.get("shape", ()), *(answer.get(name) for name in _ABOUT)]
        if (
            len(numbers) != 6
            or not all(type(number) is int and number > 0 for number in numbers)
            or numbers[2] != 3
            or numbers[0] * numbers[1] * 3 > self._memory.num_bytes
        ):
            raise DecodeError("decode_crash", f"the decoder's process says it wrote {answer!r}"[:1000])

    def image(self, answer: dict[str, Any], use: Use) -> Image:
        """The image that lies in the memory file."""
        height, width, _ = answer["shape"]
        about = {name: answer[name] for name in _ABOUT}
        return Image(use(Image(self._memory.array((height, width, 3)), **about)), **about)

    def end(self) -> None:
        self._end()


def _end(process: subprocess.Popen[bytes], files: list[Any]) -> None:
    process.kill()
    process.wait()
    for file in files:
        file.close()


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """Python finds what the parent finds (a Ray worker's working_dir stands in sys.path only); threads stay single."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    folders = [str(Path(entry).absolute()) for entry in sys.path]
    return {
        **kept,
        **_MALLOC,
        "PYTHONPATH": os.pathsep.join(folders),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _sealed_file() -> FileIO:
    handle = os.memfd_create("fcos_ray-decode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return FileIO(handle, "r+")


class _Memory:
    """A memory file and a mapping of it, kept from image to image: a new one costs 20 ms for 12 Mpx, in page faults."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self._map: mmap.mmap | None = None

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def write(self, data: bytes) -> None:
        """Put bytes at the beginning; the file grows as needed."""
        self.file.seek(0)
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]  # one write takes 2 GiB at most

    def array(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The beginning of the file as an array; the file grows as needed. Raises MemoryError."""
        num_bytes = shape[0] * shape[1] * shape[2]
        if self.num_bytes < num_bytes:
            os.ftruncate(self.file.fileno(), num_bytes)
        if self._map is None or len(self._map) < num_bytes:
            self._map = None  # before the next one: both would count against a limit of address space
            try:
                self._map = mmap.mmap(self.file.fileno(), self.num_bytes)
            except OSError as error:  # ENOMEM: the limit
                raise MemoryError(f"{self.num_bytes} bytes for pixels") from error
        return np.frombuffer(self._map, np.uint8, count=num_bytes).reshape(shape)

    def exchange(self, file: FileIO) -> None:
        """Go on with another file."""
        self.close()
        self.file = file

    def close(self) -> None:
        self._map = None  # unmapped with the last array of it
        self.file.close()


# The child's side.


def _serve(settings: ChildSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=0)
    module, _, function = settings.decoder.partition(":")
    decode = getattr(import_module(module), function)
    _limit_memory(settings.memory_bytes)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    channel.send(b"ready")
    memory: _Memory | None = None
    with suppress(ConnectionError):  # the parent is gone
        while True:
            request, files, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
            if not request:
                return
            file = FileIO(files[0], "r+")
            if memory is None or not os.path.sameopenfile(file.fileno(), memory.file.fileno()):
                memory = _Memory(file)
            else:
                file.close()
            answer = _answer(memory, int(request), decode, settings)
            channel.send(json.dumps(answer).encode())


def _limit_memory(memory_bytes: int) -> None:
    """The limit is one of address space: what the idle child has mapped (libraries mostly) comes on top."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(
    memory: _Memory, num_bytes: int, decode: Callable[..., Image], settings: ChildSettings
) -> dict[str, str | int | list[int]]:
    try:
        memory.file.seek(0)
        data = memory.file.read(num_bytes)
        signal.setitimer(signal.ITIMER_REAL, settings.alarm_seconds)
        reduced = {} if settings.model_size is None else {"model_size": settings.model_size}
        image = decode(data, max_pixels=settings.max_pixels, empty=memory.array, **reduced)
        target = memory.array(image.pixels.shape)
        if image.pixels.ctypes.data != target.ctypes.data:  # grey, or from a decoder that made an array of its own
            np.copyto(target, image.pixels)
    except DecodeError as error:
        return {"code": error.code, "message": error.message[:1000]}
    except MemoryError as error:
        return {"code": "decode_memory", "message": f"needs more than {settings.memory_bytes} bytes. {error}"[:1000]}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this image's: the parent says so and replaces us
        return {"code": "decode_crash", "message": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "shape": list(image.pixels.shape),
        "height": image.height,
        "width": image.width,
        "orientation": image.orientation,
    }


if __name__ == "__main__":
    _serve(ChildSettings(*json.loads(sys.argv[1])))
