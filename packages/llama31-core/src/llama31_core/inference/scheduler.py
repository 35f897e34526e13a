"""What the engine computes next: waiting and running requests in, batches of equal token counts out. No tensors.

A step decodes every running request by one token and prefills at most one chunk of one prompt, so a long prompt
never holds up the others for more than a chunk. First come, first served. When blocks run out, the request that came
last gives its blocks back and is computed again later (Kwon et al. 2023, section 4.5, recomputation).
Blocks that are full and known (of the same beginning in another request, or of its own before a preemption) are shared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llama31_core.inference.block_manager import BlockManager
from llama31_core.inference.request import Request


@dataclass(frozen=True)
class Batch:
    """Requests that compute the same number of new tokens in one forward pass."""

    requests: list[Request]
    num_tokens: int


class Scheduler:
    """Queues of requests and the rule by which they run.

    Args:
        blocks: the cache's block manager.
        max_batch_size: requests that run at once.
        max_prefill_tokens: tokens of one prefill chunk.
    """

    def __init__(self, blocks: BlockManager, max_batch_size: int, max_prefill_tokens: int) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.num_preemptions = 0
        self.num_prefill_tokens = 0
        self.num_prefix_hit_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request that has been checked to fit into the cache on its own."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request, wherever it is, and take its blocks back."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.blocks.release(request.block_table)

    def computed(self, request: Request, num_tokens: int) -> None:
        """Note that the next `num_tokens` of a request are in the cache; blocks that they fill can be shared now."""
        full_before = request.num_cached // self.blocks.block_size
        request.num_cached += num_tokens
        hashes = request.hash_blocks(request.num_cached, self.blocks.block_size)
        for block, content in zip(request.block_table[full_before:], hashes[full_before:], strict=False):
            self.blocks.register(block, content)

    def schedule(self) -> list[Batch]:
        """The batches of the next step, at most one decode and one prefill; empty if nothing is queued."""
        decoding = [r for r in self.running if r.num_tokens - r.num_cached == 1]
        decoding = [r for r in decoding if r in self.running and self._grow(r, r.num_tokens)]
        batches = [Batch(decoding, 1)] if decoding else []
        prefilling = next((r for r in self.running if r not in decoding), None) or self._admit()
        if prefilling is not None:
            chunk = min(prefilling.num_tokens - prefilling.num_cached, self.max_prefill_tokens)
            batches.append(Batch([prefilling], chunk))
        return batches

    def _admit(self) -> Request | None:
        """Move the first waiting request to the running ones, if a place and blocks for all its tokens are free."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return None
        request = self.waiting[0]
        # The last token is computed in any case: its logits are what the request is after.
        known = request.hash_blocks(request.num_tokens - 1, self.blocks.block_size)
        num_hits = self.blocks.take_prefix(request.block_table, known) * self.blocks.block_size
        # One token more than it has, so that it does not lose its blocks again before its first new token.
        if not self.blocks.grow(request.block_table, request.num_tokens + 1):
            self.blocks.release(request.block_table)
            return None
        request.num_cached = num_hits
        self.num_prefix_hit_tokens += num_hits
        self.num_prefill_tokens += request.num_tokens
        self.running.append(self.waiting.popleft())
        return request

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` room for `num_tokens`, at the cost of later requests; false if it was preempted itself."""
        while not self.blocks.grow(request.block_table, num_tokens):
            victim = self.running.pop()
            self.blocks.release(victim.block_table)
            victim.num_cached = 0
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        return True
