"""Block statistics: how many Ray Data keeps. Knows Ray Data's operators, not what is in a block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.block import BlockStats

MOST_BLOCKS: Final = 100


class _LastBlocks(list[BlockStats]):
    """A list still: Ray Data may read it in one thread while another adds to it."""

    def extend(self, blocks: Iterable[BlockStats]) -> None:
        """Add these, and forget the oldest."""
        super().extend(blocks)
        del self[:-MOST_BLOCKS]


class BoundedBlockStats(ExecutionCallback):
    """Lets each operator keep what it notes of its last blocks only.

    Ray Data 2.60 keeps it of every block until the execution ends, in the driver, for Dataset.stats(), whose totals are those
    of the last blocks now. 1 KB a block, of three stages, and a block holds 64 MB of pixels, or the rows of 128 images: of a
    billion images of 640×480 some 40 GB.
    """

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Exchange the lists, which only grow."""
        for operator in executor._topology or ():
            if hasattr(operator, "_output_blocks_stats"):
                operator._output_blocks_stats = _LastBlocks(operator._output_blocks_stats)


def bound_block_stats(context: DataContext) -> None:
    """Add BoundedBlockStats to a dataset's context."""
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, BoundedBlockStats]
