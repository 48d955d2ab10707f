"""States: where a training stands, as files in its output. Knows storage and torch's format, not models or recipes."""

from __future__ import annotations

import io
import logging
import re
from typing import Any, Final

import torch

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.model.weights import LOAD_ERRORS

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"state-(\d{9})\.pt")


class States:
    """<output>/state-<steps>.pt: tensors and plain values after so many steps. The newest is kept."""

    def __init__(self, output: str) -> None:
        self._output = output

    def save(self, state: dict[str, Any], *, steps: int) -> None:
        """Keep this one and delete those of fewer steps, unless another training on this output was here first."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if not storage.create(self._uri(steps), buffer.getvalue()):
            log.warning("%s is there already and stays: does another training write here?", self._uri(steps))
            return
        for uri, other in self._list():
            if other < steps:
                storage.delete(uri)

    def newest(self, *, device: torch.device) -> dict[str, Any] | None:
        """The newest state that can be read; None when there is none. Raises OutputError when all are damaged."""
        damaged: set[str] = set()
        gone: set[str] = set()
        while there := [uri for uri, _ in self._list() if uri not in damaged | gone]:
            try:
                state = torch.load(io.BytesIO(storage.read_bytes(there[0])), weights_only=True, map_location=device)
            except FileNotFoundError:  # another training kept a newer one in between: look again
                gone.add(there[0])
                continue
            except LOAD_ERRORS as error:
                log.warning("%s is damaged and passed over: %s", there[0], storage.describe(error))
                damaged.add(there[0])
                continue
            if isinstance(state, dict):
                return state
            log.warning("%s is damaged and passed over: it holds a %s", there[0], type(state).__name__)
            damaged.add(there[0])
        if damaged:
            raise OutputError(
                f"no saved state can be read: delete {', '.join(damaged)}, then the same command begins anew"
            )
        return None

    def forget(self) -> None:
        """Delete them all: the weights are there."""
        for uri, _ in self._list():
            storage.delete(uri)

    def _uri(self, steps: int) -> str:
        return storage.join(self._output, f"state-{steps:09d}.pt")

    def _list(self) -> list[tuple[str, int]]:
        """Uris and steps, newest first. An output may lie within another's: only direct children are its states."""
        named = ((file.uri, _NAME.fullmatch(file.uri.rpartition("/")[2])) for file in storage.list_files(self._output))
        found = [(uri, int(match[1])) for uri, match in named if match]
        return sorted(((uri, n) for uri, n in found if uri == self._uri(n)), key=lambda pair: -pair[1])
