"""Who owns which block of the key-value cache: token ids in, block tables out. Pure bookkeeping, no tensors.

A block that is full of computed tokens is known by a hash of these tokens and all before them. Sequences that begin
with the same tokens share such blocks; a block that nobody owns any longer keeps its content, and can be found by its
hash, until it is needed for something else. What was used least recently goes first. A block that is not full is shared
only by the branches of one sequence; who writes to it first gets a copy of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

import numpy as np

_NO_PARENT = b""


class BlockManager:
    """Hands out the blocks of a paged cache.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens that one block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def num_owners(self, block: int) -> int:
        """In how many tables a block is."""
        return self._owners[block]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int, hashes: Iterable[bytes]) -> bool:
        """Whether a table of `num_tokens` could be made now, given the hashes of the full blocks it begins with."""
        known = takewhile(lambda block: block is not None, (self._block_of.get(content) for content in hashes))
        in_use = sum(1 for block in known if block is not None and self._owners[block])
        return self.blocks_for(num_tokens) - in_use <= self.num_free

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks to `table` until it holds `num_tokens`; false, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        table.extend(self._take() for _ in range(missing))
        return True

    def own(self, table: list[int], start: int, num_tokens: int) -> list[tuple[int, int]] | None:
        """Make tokens `start` to `num_tokens` of a sequence writable: grow its table, replace shared blocks by own.

        Returns:
            The blocks to copy (from, to), or None, with nothing changed, if too few are free.
        """
        written = range(start // self.block_size, min(len(table), self.blocks_for(num_tokens)))
        shared = [index for index in written if self._owners[table[index]] > 1]
        if len(shared) + self.blocks_for(num_tokens) - len(table) > self.num_free:
            return None
        copies = []
        for index in shared:
            copies.append((table[index], self._take()))
            self._owners[table[index]] -= 1
            table[index] = copies[-1][1]
        self.grow(table, num_tokens)
        return copies

    def fork(self, table: Sequence[int]) -> list[int]:
        """A second table of the same blocks."""
        for block in table:
            self._owners[block] += 1
        return list(table)

    def take_prefix(self, table: list[int], hashes: Sequence[bytes]) -> int:
        """Put the longest run of known blocks with these hashes into the empty `table`; gives their number."""
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            self._owners[block] += 1
            self._free.pop(block, None)
            table.append(block)
        return len(table)

    def register(self, block: int, content: bytes) -> None:
        """Say what a block is now full of. If another block is known by that hash, that one stays the known one."""
        if content not in self._block_of:
            self._forget(block)
            self._block_of[content] = block
            self._hash_of[block] = content

    def release(self, table: list[int], *, forget: bool = False) -> list[int]:
        """Give up every block of `table` and empty it.

        Args:
            table: of the sequence that ends.
            forget: nobody is to find by its hash what these blocks hold.

        Returns:
            The blocks that nobody owns any longer.
        """
        freed = []
        for block in reversed(table):  # the beginning of a sequence is the likeliest to be asked for again
            self._owners[block] -= 1
            if forget:
                self._forget(block)
            if self._owners[block] == 0:
                self._free[block] = None
                freed.append(block)
        table.clear()
        return freed

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._owners[block] = 1
        return block

    def _forget(self, block: int) -> None:
        content = self._hash_of[block]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block] = None


def hash_block(parent: bytes | None, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block, given that of the block before it (None for the first)."""
    return blake2b((parent or _NO_PARENT) + np.asarray(token_ids, np.int64).tobytes(), digest_size=16).digest()
