"""Where the tokens of each sequence are kept: room for sequences in, block tables and the moves that it takes out.

Blocks live on the device. A sequence that has to make room goes to blocks of the host, if there is room for it, and
comes back by a copy; otherwise it gives up what it had and is computed again. No tensors here: the moves are carried
out, in order, before the next forward pass.
"""

from __future__ import annotations

from llama31_core.inference.batch import BlockMove
from llama31_core.inference.block_manager import BlockManager
from llama31_core.inference.sequence import Sequence


class SequenceCache:
    """The blocks of device and host, and whose they are.

    Args:
        blocks: of the device.
        num_host_blocks: blocks on the host for sequences that are swapped out.
    """

    def __init__(self, blocks: BlockManager, num_host_blocks: int = 0) -> None:
        self.blocks = blocks
        self.num_hit_tokens = 0
        self.num_entered_tokens = 0
        self.num_swapped_out = 0
        self.num_swapped_in = 0
        self._free_host = list(range(num_host_blocks))
        self._moves: list[tuple[Sequence | None, BlockMove]] = []

    @property
    def num_free_host(self) -> int:
        """Host blocks that no sequence owns."""
        return len(self._free_host)

    def take_moves(self) -> list[tuple[Sequence | None, BlockMove]]:
        """The moves that have come up since the last call, in order, each with the sequence that needs it."""
        moves, self._moves = self._moves, []
        return moves

    def fits(self, sequence: Sequence) -> bool:
        """Whether `enter` would succeed."""
        return self.blocks.fits(sequence.num_tokens + 1, self._known(sequence))

    def enter(self, sequence: Sequence) -> bool:
        """Give a sequence room for all its tokens and one more, so that it does not lose it again before its first new
        token; false, and nothing changed, if too few blocks are free."""
        table = sequence.block_table
        num_hits = self.blocks.take_prefix(table, self._known(sequence))
        if not self.blocks.grow(table, sequence.num_tokens + 1):
            self.blocks.release(table)
            return False
        if sequence.host_table:
            pairs = list(zip(sequence.host_table, table, strict=False))[num_hits:]
            self._moves += [(sequence, BlockMove("in", source, target)) for source, target in pairs]
            self._release_host(sequence)
            self.num_swapped_in += 1
        else:
            sequence.num_cached = num_hits * self.blocks.block_size
            self.num_hit_tokens += sequence.num_cached
            self.num_entered_tokens += sequence.num_tokens
        return True

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let a sequence write up to `num_tokens`; false, and nothing changed, if too few blocks are free."""
        copies = self.blocks.own(sequence.block_table, sequence.num_cached, num_tokens)
        if copies is None:
            return False
        self._moves += [(sequence, BlockMove("copy", source, target)) for source, target in copies]
        return True

    def evict(self, sequence: Sequence) -> None:
        """Take a sequence's blocks, to the host if it has room (beams are computed again: they share blocks)."""
        used = sequence.block_table[: self.blocks.blocks_for(sequence.num_cached)]
        if used and len(used) <= self.num_free_host and not sequence.in_lockstep:
            sequence.host_table = [self._free_host.pop() for _ in used]
            pairs = zip(used, sequence.host_table, strict=True)
            self._moves += [(sequence, BlockMove("out", source, target)) for source, target in pairs]
            self.num_swapped_out += 1
        else:
            sequence.num_cached = 0
        self.blocks.release(sequence.block_table)

    def release(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Take all that a sequence has. What a failed one wrote is found by nobody, and cleared: masked attention
        multiplies it by zero, which is not zero for what is not a number."""
        freed = self.blocks.release(sequence.block_table, forget=failed)
        if failed:
            self._moves += [(None, BlockMove("clear", block, block)) for block in freed]
        self._release_host(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` begin with all that `parent` has, in the same blocks."""
        child.block_table = self.blocks.fork(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_cached = parent.num_cached
        child.prompt_logprobs = parent.prompt_logprobs

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the next `num_tokens` of a sequence are in the cache; blocks that they fill can be shared now."""
        full_before = sequence.num_cached // self.blocks.block_size
        sequence.num_cached += num_tokens
        if not sequence.request.params.use_prefix_cache:
            return
        hashes = sequence.hash_blocks(sequence.num_cached, self.blocks.block_size)
        for block, content in zip(sequence.block_table[full_before:], hashes[full_before:], strict=False):
            self.blocks.register(block, content)

    def _known(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that need not be computed or copied if they are still there."""
        if not sequence.request.params.use_prefix_cache:
            return []
        if sequence.host_table:
            num_tokens = sequence.num_cached
        elif sequence.wants_prompt_logprobs:
            num_tokens = max(len(sequence.prompt_logprobs) - 1, 0)
        else:  # the last token is computed in any case: its logits are what the sequence is after
            num_tokens = sequence.num_tokens - 1
        return sequence.hash_blocks(num_tokens, self.blocks.block_size)

    def _release_host(self, sequence: Sequence) -> None:
        self._free_host += sequence.host_table
        sequence.host_table = []
