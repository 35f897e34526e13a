"""Any order of adding, aborting, failing, waiting and stepping: nothing leaks or has two owners, and all ends well."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama31_core.config import ModelConfig
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.request import StepOutput
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import PipelinedSumRunner, SumRunner

VOCAB = 101
POISON = 77  # a prompt that begins with it fails to compute
CONFIG = ModelConfig.build(
    "test", vocab_size=VOCAB, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, max_seq_len=64, eos_token_ids=(0,)
)
BEGINNING = [11, 7, 5, 3, 2, 1, 42, 99, 13, 17, 19, 23]
prompts = st.lists(st.integers(1, 60), min_size=1, max_size=14) | st.builds(
    lambda shared, rest: BEGINNING[:shared] + rest,
    st.integers(0, 12),
    st.lists(st.integers(1, 2), min_size=1, max_size=4),
)


class PoisonedRunner(SumRunner):
    """Fails on a poisoned sequence, after it has written the cache of every row."""

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        logits = super().forward(batch)
        if any(self.cache[table[0], 0] == POISON for table in batch.block_tables):
            raise RuntimeError("poison")
        return logits


class EngineMachine(RuleBasedStateMachine):
    """Compares every request with what it gives when it is alone."""

    @initialize(
        num_blocks=st.integers(11, 18),
        num_host_blocks=st.sampled_from([0, 3, 40]),
        max_batch_size=st.integers(3, 6),
        max_prefill_tokens=st.integers(1, 12),
        max_prefill_batch_size=st.integers(1, 3),
        max_queue_delay_s=st.sampled_from([0.0, 0.5]),
        num_speculative_tokens=st.sampled_from([0, 3]),
        num_stages=st.sampled_from([1, 1, 2, 3]),
    )
    def start(self, num_blocks: int, num_host_blocks: int, num_stages: int, **options: Any) -> None:
        self.now_s = 0.0
        sizes = (VOCAB, num_blocks, 4, num_host_blocks)
        self.may_fail = num_stages == 1  # what fails on a rank ends all of them
        self.runner: SumRunner = PoisonedRunner(*sizes, spread=0.3)
        if num_stages > 1:
            self.runner = PipelinedSumRunner(num_stages, *sizes, spread=0.3)
        self.engine = Engine(CONFIG, self.runner, EngineOptions(max_seq_len=32, **options), clock=lambda: self.now_s)
        self.wanted: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[str, list[StepOutput]] = {}
        self.count = 0

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 10),
        kind=st.sampled_from(["greedy", "sampled", "n", "beams", "prompt"]),
        priority=st.integers(-2, 2),
        poisoned=st.integers(0, 9),
    )
    def add(self, prompt: list[int], max_tokens: int, kind: str, priority: int, poisoned: int) -> None:
        more = {
            "greedy": {"temperature": 0},
            "sampled": {"seed": self.count},
            "n": {"seed": self.count, "n": 3},
            "beams": {"temperature": 0, "num_beams": 2, "n": 2},
            "prompt": {"temperature": 0, "prompt_logprobs": 1},
        }[kind]
        params = SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]
        name = str(self.count)
        self.count += 1
        prompt = [POISON, *prompt] if poisoned == 0 and self.may_fail else prompt
        self.engine.add(name, prompt, params, priority=priority)
        self.wanted[name] = (prompt, params)
        self.outputs[name] = []

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        self.engine.abort(name)
        del self.wanted[name]

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(steps=st.integers(1, 2))  # few, so that requests pile up and blocks run out
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                if output.request_id in self.wanted:
                    self.outputs[output.request_id].append(output)

    @invariant()
    def every_block_has_the_owners_that_are_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine._scheduler
        cache = scheduler.cache
        sequences = [s for group in self.engine._execution.groups.values() for s in group.sequences]
        assert {*scheduler.running, *scheduler.waiting} == set(sequences)
        assert len(scheduler.running) + len(scheduler.waiting) == len(sequences)
        assert sum(sequence.width for sequence in scheduler.running) <= self.engine.options.max_batch_size
        assert all(sequence.block_table for sequence in scheduler.running)
        assert not any(sequence.block_table for sequence in scheduler.waiting)
        owners: Counter[int] = Counter()
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            owners.update(sequence.block_table)
        assert [cache.blocks.num_owners(b) for b in range(cache.blocks.num_blocks)] == [
            owners[b] for b in range(cache.blocks.num_blocks)
        ]
        assert cache.blocks.num_free == cache.blocks.num_blocks - len(owners)
        on_host = [block for sequence in sequences for block in sequence.host_table]
        assert sorted([*on_host, *cache._free_host]) == list(range(self.runner.num_host_blocks))

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_unfinished():
                break
            self.now_s += 0.1
            self.step(1)
            self.every_block_has_the_owners_that_are_counted()
        assert not self.engine.has_unfinished(), "not every request ends"
        assert self.engine.num_free_blocks == self.runner.num_blocks
        assert self.engine.stats().num_free_host_blocks == self.runner.num_host_blocks
        for name, (prompt, params) in self.wanted.items():
            self._compare(prompt, params, self.outputs[name])

    def _compare(self, prompt: list[int], params: SamplingParams, outputs: list[StepOutput]) -> None:
        """The same tokens and reasons as alone, with room for everything."""
        if prompt[0] == POISON:
            assert [(o.index, o.finish_reason, o.error) for o in outputs] == [
                (index, "error", "RuntimeError: poison") for index in range(params.n)
            ]
            return
        alone = Engine(CONFIG, SumRunner(VOCAB, 64, 4, spread=0.3), EngineOptions(max_seq_len=32))
        for completion in alone.generate([prompt], params):
            mine = [output for output in outputs if output.index == completion.index]
            assert [token for output in mine for token in output.token_ids] == completion.token_ids
            assert mine[-1].finish_reason == completion.finish_reason
            assert mine[0].prompt_logprobs == completion.prompt_logprobs


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase
