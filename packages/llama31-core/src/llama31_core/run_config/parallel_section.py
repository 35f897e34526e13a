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


class ParallelContext(Section):
    """`parallel`: what of MindSpore's own context has a meaning here."""

    enable_parallel_optimizer: bool = False


def mesh_of(sizes: ParallelConfigSection, context: ParallelContext, offset: int | tuple[int, ...]) -> ParallelConfig:
    """The mesh that both sections and `model.model_config.offset` describe; an offset of 0 is none."""
    return ParallelConfig(
        dp=sizes.data_parallel,
        cp=sizes.context_parallel,
        tp=sizes.model_parallel,
        pp=sizes.pipeline_stage,
        vocab_parallel=not sizes.vocab_emb_dp,
        shard_optimizer=context.enable_parallel_optimizer,
        offset=offset if isinstance(offset, tuple) else None,
    )
