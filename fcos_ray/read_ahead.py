"""Read-ahead: how many blocks of rows may wait for load tasks. Knows Ray Data's scheduler, not what is in a block."""

from __future__ import annotations

from typing import Final

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

_LEAST_BLOCKS: Final = 100  # half a minute of two load tasks of thumbnails
_BLOCKS_PER_TASK: Final = 4


class ReadAheadPolicy(BackpressurePolicy):
    """Lets the first stage pause while enough of its blocks wait for the second: no task is begun, none hands on more.

    Ray Data 2.60 bounds what waits in bytes. Rows of a manifest are small: it reads 170,000 of them while 2,000 are loaded,
    and in the end the whole manifest, and the driver holds some 17 KB for each block that waits. While no load task has
    room it still lets a block pass now and then, until the tasks that have begun are done.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Whether the operator may start a task."""
        return not self._is_ahead(op)

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """Whether blocks of tasks that run may come, too: none, or as many as others allow."""
        # Only of an operator with tasks: others that hand on nothing are warned of as idle
        return 0 if op.num_active_tasks() and self._is_ahead(op) else None

    def _is_ahead(self, op: PhysicalOperator) -> bool:
        if not any(isinstance(source, InputDataBuffer) for source in op.input_dependencies):
            return False
        waiting = sum(self._topology[follower].total_enqueued_input_blocks() for follower in op.output_dependencies)
        at_work = sum(follower.num_active_tasks() for follower in op.output_dependencies)
        return bool(waiting >= max(_LEAST_BLOCKS, _BLOCKS_PER_TASK * at_work))


def bound_read_ahead(context: DataContext) -> None:
    """Add ReadAheadPolicy to a dataset's context."""
    others = context.get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, ENABLED_BACKPRESSURE_POLICIES)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*others, ReadAheadPolicy])
    # What passes while no load task has room: ten blocks a second by default
    context.output_backpressure_guard_release_interval_s = 1.0
