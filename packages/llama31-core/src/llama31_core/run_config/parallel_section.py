"""The sections of a run file that say how many devices do what."""

from __future__ import annotations

from pydantic import Field

from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.run_config.section import Section


class ParallelConfigSection(Section):
    """`parallel_config`: sizes of the mesh."""

    data_parallel: int = Field(default=1, ge=1)
    model_parallel: int = Field(default=1, ge=1)
    pipeline_stage: int = Field(default=1, ge=1)
    context_parallel: int = Field(default=1, ge=1)
    use_seq_parallel: bool = False
    micro_batch_num: int = Field(default=1, ge=1)
    vocab_emb_dp: bool = True


class ParallelOptimizer(Section):
    """`parallel.parallel_optimizer_config`: gradients are split too where the optimiser's state is."""

    gradient_accumulation_shard: bool = False


class ParallelContext(Section):
    """`parallel`: what of MindSpore's own context has a meaning here."""

    enable_parallel_optimizer: bool = False
    parallel_optimizer_config: ParallelOptimizer = ParallelOptimizer()


def mesh_of(
    sizes: ParallelConfigSection, context: ParallelContext, offset: int | tuple[int, ...], interleave: int
) -> ParallelConfig:
    """The mesh that both sections, `offset` and `pp_interleave_num` of the model describe; an offset of 0 is none."""
    shards_gradients = context.parallel_optimizer_config.gradient_accumulation_shard
    return ParallelConfig(
        dp=sizes.data_parallel,
        cp=sizes.context_parallel,
        tp=sizes.model_parallel,
        pp=sizes.pipeline_stage,
        vocab_parallel=not sizes.vocab_emb_dp,
        sequence_parallel=sizes.use_seq_parallel,
        shard_optimizer=context.enable_parallel_optimizer,
        shard_gradients=context.enable_parallel_optimizer and shards_gradients,
        interleave=interleave if sizes.pipeline_stage > 1 else 1,
        offset=offset if isinstance(offset, tuple) else None,
    )
