"""Who owns which block of the key-value cache: token counts in, block tables out. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import deque


class BlockManager:
    """Hands out the blocks of a paged cache.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens that one block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks to `table` until it holds `num_tokens`; false, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        table.extend(self._free.popleft() for _ in range(missing))
        return True

    def release(self, table: list[int]) -> None:
        """Take back every block of `table` and empty it."""
        self._free.extend(table)
        table.clear()
