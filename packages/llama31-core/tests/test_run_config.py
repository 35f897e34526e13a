"""The YAML of a fine-tuning run: MindFormers' keys, overrides, and one clear sentence for what is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.precision import Precision
from llama31_core.run_config import load_predict_config, load_run_config
from llama31_core.training.schedule import plan_warmup

MINIMAL = "lr_schedule: {learning_rate: 1.e-5}\n"


@pytest.fixture
def write(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_values_have_their_types_and_overrides_win(write: Path) -> None:
    write.write_text(MINIMAL + "runner_config: {epochs: 2, batch_size: 4}\noptimizer: {beta1: 0.8, eps: 1e-8}\n")
    run = load_run_config(write, ["runner_config.epochs=5", "model.model_config.seq_length=64", "output_dir=out"])
    assert (run.runner_config.epochs, run.runner_config.batch_size) == (5, 4)
    assert run.model_section.seq_length == 64
    assert run.output_dir == "out"
    assert run.lr_schedule.learning_rate == 1e-5
    assert run.optimizer.moments == (0.8, 0.95)
    assert run.optimizer.eps == 1e-8  # YAML 1.1 takes 1e-8 for a string


def test_keys_without_a_meaning_here_are_named_in_one_warning(write: Path, caplog: pytest.LogCaptureFixture) -> None:
    write.write_text(
        MINIMAL
        + "runner_config: {sink_mode: True}\ntrainer: {type: CausalLanguageModelingTrainer, model_name: x}\n"
        + "model: {model_config: {type: LlamaConfig, use_past: False}, arch: {type: LlamaForCausalLM}}\n"
    )
    with caplog.at_level(logging.WARNING):
        load_run_config(write)
    [record] = caplog.records
    for key in ("runner_config.sink_mode", "trainer", "model.model_config.type", "model.arch"):
        assert key in record.getMessage()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "runner_confg: {}", r"unknown key 'runner_confg'; did you mean 'runner_config'"),
        (MINIMAL + "runner_config: {epoch: 1}", r"unknown key 'runner_config.epoch'; did you mean 'epochs'"),
        (MINIMAL + "model: {model_config: {seq_len: 1}}", r"'model.model_config.seq_len'; did you mean 'seq_length'"),
        (MINIMAL + "runner_config: {epochs: two}", "runner_config.epochs.*'two'"),
        (MINIMAL + "runner_config: {batch_size: 0}", "runner_config.batch_size"),
        (MINIMAL + "optimizer: {type: Lion}", r"optimizer\.type.*'Lion'"),
        ("lr_schedule: {learning_rate: -1}", "lr_schedule.learning_rate"),
        ("run_mode: finetune", "lr_schedule"),
        ("- 1", "holds list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_named_by_file_and_key(text: str, message: str, write: Path) -> None:
    write.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_run_config(write)
    assert str(write) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [("epochs", "section.key=value"), ("seed.x=1", "'seed' is a value"), ("seed=[", "not YAML"), ("sed=1", "'seed'")],
)
def test_bad_overrides_are_named(override: str, message: str, write: Path) -> None:
    write.write_text("seed: 1\n" + MINIMAL)
    with pytest.raises(ConfigError, match=message):
        load_run_config(write, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_run_config(tmp_path / "none.yaml")


def test_architecture_keys_must_fit_the_checkpoint(write: Path) -> None:
    write.write_text(MINIMAL + "model: {model_config: {num_layers: 2, hidden_size: 128, seq_length: 32}}")
    with pytest.raises(ConfigError, match=r"hidden_size is 128, the checkpoint's is 64"):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")


def test_a_sequence_beyond_the_context_is_refused(write: Path) -> None:
    write.write_text(MINIMAL + "model: {model_config: {seq_length: 513}}")
    with pytest.raises(ConfigError, match="513, beyond the model's context of 512"):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")


def test_warmup_is_given_once_and_ends_within_the_run() -> None:
    assert plan_warmup(None, 0.1, 50) == 5
    assert plan_warmup(7, None, 50) == 7
    assert plan_warmup(None, None, 50) == 0
    with pytest.raises(ConfigError, match="both"):
        plan_warmup(1, 0.1, 50)
    with pytest.raises(ConfigError, match="more than the 50 steps"):
        plan_warmup(51, None, 50)


# The keys of MindFormers' four files for llama3_1, with the values that it gives them where a value is a matter of
# architecture or layout; the rest is there to be found dead.
_EVERY_FILE = """
seed: 0
output_dir: ./output
load_checkpoint: ''
src_strategy_path_or_dir: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
run_mode: {mode}
trainer: {{type: CausalLanguageModelingTrainer, model_name: llama3_1}}
runner_config: {{epochs: 2, batch_size: 1, sink_mode: True, sink_size: 2}}
use_parallel: True
parallel:
  {{parallel_mode: 1, gradients_mean: False, enable_alltoall: False, full_batch: True, search_mode: x,
  enable_parallel_optimizer: {shard}, strategy_ckpt_save_file: ./ckpt_strategy.ckpt,
  parallel_optimizer_config: {{gradient_accumulation_shard: False, parallel_optimizer_threshold: 64}}}}
parallel_config:
  {{{mesh}, gradient_aggregation_group: 4}}
micro_batch_interleave_num: 1
context: {{mode: 0, device_target: Ascend, enable_graph_kernel: False, max_call_depth: 10000, max_device_memory: 58GB,
  save_graphs: False, save_graphs_path: ./graph, device_id: 0,
  jit_config: {{jit_level: O1}}, memory_optimize_level: O0}}
eval_dataset: {{data_loader: {{type: MindDataset, dataset_dir: '', shuffle: False}}, input_columns: [input_ids]}}
eval_dataset_task: {{type: CausalLanguageModelDataset}}
metric: {{type: PerplexityMetric}}
runner_wrapper: {{type: MFTrainOneStepCell, scale_sense: 1.0, use_clip_grad: True}}
eval_callbacks: [{{type: ObsMonitor}}]
auto_tune: False
filepath_prefix: ./autotune
autotune_per_step: 10
profile: False
profile_start_step: 4
profile_stop_step: 8
init_start_profile: False
profile_communication: False
profile_memory: True
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256
remote_save_url: nowhere
model:
  arch: {{type: LlamaForCausalLM}}
  model_config:
    {{type: LlamaConfig, batch_size: 1, {sizes}, n_kv_heads: 8, vocab_size: 128256, rms_norm_eps: 1.0e-5,
    bos_token_id: 128000, eos_token_id: 128001, pad_token_id: 128002, ignore_token_id: -100,
    layernorm_compute_type: float32, softmax_compute_type: float32, rotary_dtype: float32, theta: 500000, offset: 0,
    use_flash_attention: True, checkpoint_name_or_path: '', repetition_penalty: 1, max_decode_length: 512, top_k: 3,
    top_p: 1, do_sample: False, {rest}}}
{sections}
"""
_SIZES = {
    "8b": "hidden_size: 4096, num_layers: 32, num_heads: 32, intermediate_size: 14336",
    "70b": "hidden_size: 8192, num_layers: 80, num_heads: 64, ffn_dim_multiplier: 1.3, multiple_of: 256",
}
_MESH = """data_parallel: {}, model_parallel: {}, pipeline_stage: {}, use_seq_parallel: {}, micro_batch_num: {},
  vocab_emb_dp: {}"""
_PREDICTED = """seq_length: 8192, compute_dtype: float16, param_init_type: bfloat16, is_dynamic: True, use_past: True,
    max_position_embedding: 131072, extend_method: LLAMA3, scaling_factor: {factor: 8.0, low_freq_factor: 1.0,
    high_freq_factor: 4.0, original_max_position_embeddings: 8192}, block_size: 16, num_blocks: 512,
    fine_grain_interleave: 1, auto_map: {AutoTokenizer: [llama3_1_tokenizer.Llama3Tokenizer, null]}"""
_TRAINED = """seq_length: 8192, compute_dtype: bfloat16, param_init_type: float32, embedding_init_type: bfloat16,
    use_past: False, extend_method: 'None', scaling_factor: 1.0, fine_grain_interleave: 2"""
_PROCESSOR = """processor: {return_tensors: ms, type: LlamaProcessor, tokenizer: {model_max_length: 8192,
  type: Llama3Tokenizer,
  vocab_file: /path/tokenizer.model, pad_token: x, auto_register: llama3_1_tokenizer.Llama3Tokenizer}}"""
_TRAINING = """optimizer: {type: AdamW, betas: [0.9, 0.95], eps: 1.e-8}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-5, lr_end: 0.0, warmup_ratio: 0.03, total_steps: -1}
train_dataset: &train_dataset {data_loader: {type: MindDataset, dataset_dir: '', shuffle: True}, batch_size: 6,
  repeat: 1,
  input_columns: [input_ids, labels], num_parallel_workers: 8, python_multiprocessing: False, drop_remainder: True,
  numa_enable: False, prefetch_size: 1}
train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train_dataset}
do_eval: False
recompute_config: {recompute: True, select_recompute: [10, 8, 6, 4, 2, 0, 0, 0], mp_comm_recompute: True}
callbacks: [{type: MFLossMonitor}, {type: CheckpointMonitor, prefix: llama, save_checkpoint_steps: 10000}]"""


def mindformers_file(mode: str, size: str, mesh: tuple[object, ...]) -> str:
    predicts = mode == "predict"
    return _EVERY_FILE.format(
        mode=mode,
        shard=not predicts,
        mesh=_MESH.format(*mesh),
        sizes=_SIZES[size],
        rest=_PREDICTED if predicts else _TRAINED,
        sections=_PROCESSOR if predicts else _TRAINING,
    )


@pytest.mark.parametrize(
    ("mode", "size", "mesh"),
    [
        ("predict", "8b", (1, 1, 1, False, 1, True)),
        ("predict", "70b", (1, 4, 1, False, 1, True)),
        ("train", "8b", (8, 1, 1, False, 1, True)),
        ("train", "70b", (1, 8, 8, True, 256, False)),
    ],
)
def test_the_key_sets_of_mindformers_four_files_load(
    mode: str, size: str, mesh: tuple[int, ...], write: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write.write_text(mindformers_file(mode, size, mesh))
    with caplog.at_level(logging.WARNING):
        run = load_predict_config(write) if mode == "predict" else load_run_config(write)
    [record] = caplog.records  # one, whatever is dead
    for key in ("context", "metric", "parallel.full_batch", "model.model_config.rotary_dtype", "profile_memory"):
        assert f"{key} (" in record.getMessage()
    assert (run.parallel.dp, run.parallel.tp, run.parallel.pp) == mesh[:3]
    assert (run.parallel_config.use_seq_parallel, run.parallel_config.micro_batch_num) == mesh[3:5]
    assert run.parallel.vocab_parallel != mesh[5]
    preset = ModelConfig.preset(f"llama3.1-{size}")
    run.model_section.check_against(preset, "run.yaml")
    assert run.model_section.architecture("run.yaml").ffn_dim == preset.ffn_dim


@pytest.mark.parametrize("value", [True, False])
def test_qkv_concat_is_a_matter_of_the_checkpoint(value: bool, write: Path, caplog: pytest.LogCaptureFixture) -> None:
    write.write_text(MINIMAL + f"model: {{model_config: {{seq_length: 32, qkv_concat: {value}}}}}")
    with caplog.at_level(logging.WARNING):
        load_run_config(write)
    [record] = caplog.records
    assert "model.model_config.qkv_concat (a checkpoint's own names say which" in record.getMessage()


def test_a_file_that_says_plain_rotary_embedding_is_told_that_the_checkpoint_decides(
    write: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write.write_text(MINIMAL + "model: {model_config: {seq_length: 32, extend_method: 'None', scaling_factor: 1.0}}")
    with caplog.at_level(logging.WARNING):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")
    assert "rotary embedding is scaled" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "extend_method: LLAMA3, scaling_factor: {factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
            "original_max_position_embeddings: 64}",
            "scaling_factor is .*'factor': 4.0",
        ),
        ("extend_method: LLAMA3, scaling_factor: 8.0", "expected factor, low_freq_factor"),
        ("extend_method: NTK", "extend_method.*'NTK'"),
        ("extend_method: 'None', scaling_factor: 2.0", "without extend_method"),
    ],
)
def test_other_scaling_than_the_checkpoints_is_refused(keys: str, message: str, write: Path) -> None:
    write.write_text(MINIMAL + f"model: {{model_config: {{seq_length: 32, {keys}}}}}")
    with pytest.raises(ConfigError, match=message):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")


def test_number_types_and_one_device_without_use_parallel(write: Path) -> None:
    write.write_text(
        MINIMAL + "use_parallel: False\nparallel_config: {data_parallel: 8}\n"
        "model: {model_config: {compute_dtype: float16, param_init_type: float32}}\n"
    )
    run = load_run_config(write)
    assert run.parallel.world_size == 1
    assert load_run_config(write, ["use_parallel=True"]).parallel.world_size == 8
    assert run.model_section.precision("Ascend") == Precision("float32", "float16")
    assert run.model_section.precision("CPU") == Precision("float32", "float32")


def test_what_prediction_takes_from_its_file(write: Path) -> None:
    keys = "seq_length: 64, num_blocks: 8, block_size: 8, top_k: 3, do_sample: True"
    write.write_text(f"run_mode: predict\nmodel: {{model_config: {{{keys}}}}}")
    section = load_predict_config(write).model_section
    options = EngineOptions(**section.engine_values())
    assert (options.num_blocks, options.block_size, options.max_seq_len) == (8, 8, 64)
    assert SamplingParams(**section.sampling_values()).top_k == 3
    greedy = load_predict_config(write, ["model.model_config.do_sample=False"]).model_section
    assert SamplingParams(**greedy.sampling_values()).temperature == 0
    with pytest.raises(ConfigError, match="num_blocks=7 of block_size=8 tokens hold fewer than seq_length=64"):
        load_predict_config(write, ["model.model_config.num_blocks=7"])
