"""Block statistics: how many Ray Data keeps. Knows Ray Data's operators, not what is in a block."""

from __future__ import annotations

from collections import deque
from typing import Final

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

MOST_BLOCKS: Final = 100


class BoundedBlockStats(ExecutionCallback):
    """Lets each operator keep what it notes of its last blocks only.

    Ray Data 2.60 keeps it of every block until the execution ends, in the driver, for Dataset.stats(), which is of the last
    blocks now. 1 KB a block, and a block holds 64 MB of pixels: of a billion images of 640×480 some 40 GB.
    """

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Exchange the lists, which only grow."""
        for operator in executor._topology or ():
            if hasattr(operator, "_output_blocks_stats"):
                operator._output_blocks_stats = deque(operator._output_blocks_stats, maxlen=MOST_BLOCKS)


def bound_block_stats(context: DataContext) -> None:
    """Add BoundedBlockStats to a dataset's context."""
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, BoundedBlockStats]
