"""What the engine computes next: waiting and running sequences in, chunks of tokens out. No tensors, no clock.

Whoever is most urgent is served first: urgency is the time of arrival, moved by the priority (see `urgency`), so it
never changes, and of any two sequences always the same one goes first. A step decodes every running sequence and
prefills prompts up to a budget of tokens, so that a long prompt holds up the others for no more than one chunk. When
blocks run out, or a more urgent sequence waits for them or for a place, the least urgent one makes room (Kwon et al.
2023, section 4.5). The most urgent of all can take every block and place, so each step brings it forward; when it has
ended another is the most urgent: nobody starves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import count
from operator import attrgetter

from llama31_core.inference.cache import SequenceCache
from llama31_core.inference.sequence import Sequence

# Rows of logits (V numbers each) that prompt logprobs may ask of one forward pass.
MAX_PROMPT_LOGIT_ROWS = 64
_by_urgency = attrgetter("urgency")
_arrivals = count()


def urgency(arrival_s: float, priority: int, priority_step_s: float) -> tuple[float, int]:
    """A request of priority p is served as if it had come p * `priority_step_s` seconds later than it did.

    So a lower number goes first among requests that came within that time of each other, first come first served
    decides among equals, and no stream of urgent requests can hold up another one for ever.
    """
    return arrival_s + priority * priority_step_s, next(_arrivals)


@dataclass(frozen=True)
class Chunk:
    """The next `num_tokens` known tokens of a sequence; its blocks hold `max_drafts` more, to be guessed."""

    sequence: Sequence
    num_tokens: int
    max_drafts: int = 0


class Scheduler:
    """Queues of sequences and the rule by which they run.

    Args:
        cache: where their tokens are kept.
        max_batch_size: sequences that run at once.
        max_prefill_tokens: prompt tokens computed in one step.
        max_prefill_batch_size: prompts that a step computes tokens of.
        max_queue_delay_s: how long a new request may wait for others to be prefilled with.
        max_drafts: tokens to guess ahead of each decoding sequence.
    """

    def __init__(
        self,
        cache: SequenceCache,
        max_batch_size: int,
        max_prefill_tokens: int,
        max_prefill_batch_size: int,
        max_queue_delay_s: float = 0.0,
        max_drafts: int = 0,
    ) -> None:
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.max_prefill_batch_size = max_prefill_batch_size
        self.max_queue_delay_s = max_queue_delay_s
        self.max_drafts = max_drafts
        self.waiting: list[Sequence] = []  # both by urgency
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._is_held_up = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has been checked to fit into cache and batch on its own."""
        insort(self.waiting, sequence, key=_by_urgency)

    def add_branch(self, parent: Sequence, branch: Sequence) -> None:
        """Let a branch of a running sequence run with it; the place was kept for it."""
        self.cache.fork(parent, branch)
        insort(self.running, branch, key=_by_urgency)

    def finish(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.cache.release(sequence, failed=failed)

    def schedule(self, now_s: float) -> list[Chunk]:
        """The work of the next step; empty if nothing is queued, or all that is waits for more to come."""
        admits = self.gathering_s(now_s) == 0
        if admits:
            self._yield_to_more_urgent()
        budget = _Budget(self.max_prefill_tokens, self.max_prefill_batch_size)
        preempted, self._is_held_up = self.num_preemptions, False
        chunks = [self._next_chunk(sequence, budget) for sequence in tuple(self.running)]
        # Nobody enters in a step in which blocks ran out: it could be one that has just made room.
        admits = admits and not self._is_held_up and self.num_preemptions == preempted
        while admits and not budget.is_spent and (sequence := self._admit()) is not None:
            chunks.append(self._next_chunk(sequence, budget))
        # A sequence that has made room for another has no blocks any more.
        return [chunk for chunk in chunks if chunk is not None and chunk.sequence.block_table]

    def _next_chunk(self, sequence: Sequence, budget: _Budget) -> Chunk | None:
        """What a running sequence computes next; nothing if it waits for the budget, for its fellow beams, for a pass
        that it is in, or for blocks of one in a pass, which a more urgent one waits for."""
        if sequence.in_flight or self._is_held_up:
            return None
        decodes = sequence.num_uncached == 1 and bool(sequence.output_ids)
        size = 1 if decodes else min(sequence.num_uncached, budget.longest_chunk(sequence))
        if not sequence.block_table or not size or not self._make_room(sequence, sequence.num_cached + size):
            return None
        if decodes:
            return Chunk(sequence, 1, self._draft_room(sequence))
        budget.spend(size)
        return Chunk(sequence, size)

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if places and blocks are free."""
        if not self.waiting or self._waits_for_beams(self.waiting[0]):
            return None
        if not self._has_place(self.waiting[0]) or not self.cache.enter(self.waiting[0]):
            return None
        sequence = self.waiting.pop(0)
        insort(self.running, sequence, key=_by_urgency)
        return sequence

    def _waits_for_beams(self, sequence: Sequence) -> bool:
        """Whether a beam that comes back had better share what its fellows are computing: all of them are only sure to
        fit into the cache together if what they have in common is there once."""
        fellows = (other for other in self.running if other.request is sequence.request)
        return sequence.in_lockstep and any(other.num_uncached for other in fellows)

    def _has_place(self, sequence: Sequence) -> bool:
        return sum(other.width for other in self.running) + sequence.width <= self.max_batch_size

    def _yield_to_more_urgent(self) -> None:
        """Preempt running sequences while the first waiting one is more urgent than they and has no room."""
        while self.waiting and self.running and self.waiting[0].urgency < self.running[-1].urgency:
            if self._has_place(self.waiting[0]) and self.cache.fits(self.waiting[0]):
                return
            if not self._preempt(self.running[-1]):
                return

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for `num_tokens`, at the cost of less urgent sequences; false if `sequence` was preempted itself, or
        waits for one that is in a pass."""
        while not self.cache.make_room(sequence, num_tokens):
            self._is_held_up = not self._preempt(self.running[-1])
            if self._is_held_up or not sequence.block_table:
                return False
        return True

    def _preempt(self, victim: Sequence) -> bool:
        """Take a sequence's place and blocks; false, and nothing changed, if a pass is writing there."""
        together = victim.in_lockstep
        victims = [s for s in self.running if s is victim or (together and s.request is victim.request)]
        if any(sequence.in_flight for sequence in victims):
            return False
        for sequence in victims:
            self.running.remove(sequence)
            self.cache.evict(sequence)
            insort(self.waiting, sequence, key=_by_urgency)
            self.num_preemptions += 1
        return True

    def _draft_room(self, sequence: Sequence) -> int:
        """Tokens to guess, if blocks for them are free: nobody makes room for a guess."""
        left = sequence.request.max_tokens - len(sequence.output_ids) - 1
        wanted = 0 if sequence.in_lockstep else min(self.max_drafts, left)
        if wanted <= 0 or not self.cache.make_room(sequence, sequence.num_tokens + wanted):
            return 0
        return wanted

    def gathering_s(self, now_s: float) -> float:
        """How many seconds new requests go on waiting for others to be prefilled with; 0 if they need not."""
        if not self.max_queue_delay_s or not self.waiting or self.waiting[0].output_ids or self.waiting[0].num_cached:
            return 0.0
        if len(self.waiting) >= min(self.max_prefill_batch_size, self.max_batch_size):
            return 0.0
        if sum(sequence.num_tokens for sequence in self.waiting) >= self.max_prefill_tokens:
            return 0.0
        return max(0.0, self.max_queue_delay_s - now_s + min(s.request.arrival_s for s in self.waiting))


class _Budget:
    """Tokens and prompts that one step may still prefill."""

    def __init__(self, num_tokens: int, num_prompts: int) -> None:
        self._num_tokens = num_tokens
        self._num_prompts = num_prompts

    @property
    def is_spent(self) -> bool:
        return not self._num_tokens or not self._num_prompts

    def longest_chunk(self, sequence: Sequence) -> int:
        if not self._num_prompts:
            return 0
        return min(self._num_tokens, MAX_PROMPT_LOGIT_ROWS) if sequence.wants_prompt_logprobs else self._num_tokens

    def spend(self, num_tokens: int) -> None:
        self._num_tokens -= num_tokens
        self._num_prompts -= 1
