"""MindFormers' keys that mean nothing here, each with the reason; a section's name covers all that is in it.

An element of a list is named by its `type`.
"""

from collections.abc import Mapping

_TOOL = "it was a MindFormers tool"
_PROFILER = "it belongs to MindFormers' profiler"
_FLOAT32 = "it is float32 always"
_NOT_TRAINING = "prediction evaluates nothing"
_DEVICE = "the device and MindSpore's defaults decide"
_ONE = "there is one architecture"
_RECOMPUTE = "what a layer computes again includes its communication"
_PIPELINE = "it tuned MindFormers' pipeline"

_ANY_RUN = {
    "src_strategy_path_or_dir": "a rank reads its slices of any checkpoint, so the source's layout is not asked for",
    "only_save_strategy": "layouts come from a table and need no saving",
    "trainer": "there is one trainer",
    "context": _DEVICE,
    "parallel.parallel_mode": "parallelism is explicit, a process per device",
    "parallel.gradients_mean": "gradients are averaged over the tokens of all ranks",
    "parallel.enable_alltoall": "parallelism is explicit, a process per device",
    "parallel.full_batch": "every data parallel rank reads its own records",
    "parallel.search_mode": "parallelism is explicit, a process per device",
    "parallel.strategy_ckpt_save_file": "layouts come from a table and need no saving",
    "parallel.parallel_optimizer_config.parallel_optimizer_threshold": "optimiser state is split wherever it divides",
    "parallel_config.gradient_aggregation_group": _PIPELINE,
    "micro_batch_interleave_num": _PIPELINE,
    "model.arch": _ONE,
    "model.model_config.type": _ONE,
    "model.model_config.batch_size": "it does not limit a batch here",
    "model.model_config.use_past": "prediction keeps a cache, training does not",
    "model.model_config.is_dynamic": "prediction compiles one graph of any shape",
    "model.model_config.use_flash_attention": "the device decides",
    "model.model_config.checkpoint_name_or_path": "load_checkpoint decides",
    "model.model_config.layernorm_compute_type": _FLOAT32,
    "model.model_config.softmax_compute_type": _FLOAT32,
    "model.model_config.rotary_dtype": _FLOAT32,
    "model.model_config.embedding_init_type": "param_init_type decides",
    "model.model_config.fine_grain_interleave": _PIPELINE,
    "model.model_config.qkv_concat": "a checkpoint's own names say which weights are stacked",
    "eval_dataset_task": "it repeats eval_dataset",
    "eval_callbacks": "it was a cloud platform's",
    "metric": "an evaluation gives loss and perplexity",
    "auto_tune": _TOOL,
    "filepath_prefix": _TOOL,
    "autotune_per_step": _TOOL,
    "profile": _PROFILER,
    "profile_start_step": _PROFILER,
    "profile_stop_step": _PROFILER,
    "init_start_profile": _PROFILER,
    "profile_communication": _PROFILER,
    "profile_memory": _PROFILER,
    "layer_scale": "it belongs to vision models",
    "layer_decay": "it belongs to vision models",
    "lr_scale_factor": "the learning rate is what lr_schedule says",
    "remote_save_url": "it was a cloud platform's",
}

TRAINING_DEAD_KEYS: Mapping[str, str] = _ANY_RUN | {
    "runner_config.sink_mode": "data is fed step by step",
    "runner_config.sink_size": "data is fed step by step",
    **{
        f"{section}.{key}": reason
        for section in ("train_dataset", "eval_dataset")
        for key, reason in {
            "python_multiprocessing": "records are ready-made and no Python runs per record",
            "batch_size": "runner_config.batch_size decides",
            "repeat": "runner_config.epochs decides",
            "numa_enable": "the operating system places the workers",
            "prefetch_size": "MindSpore's default serves",
        }.items()
    },
    "train_dataset_task": "it repeats train_dataset",
    "runner_wrapper.type": "there is one training step",
    "runner_wrapper.scale_sense": "loss_scale_value decides",
    "recompute_config.parallel_optimizer_comm_recompute": _RECOMPUTE,
    "recompute_config.mp_comm_recompute": _RECOMPUTE,
    "recompute_config.recompute_slice_activation": _RECOMPUTE,
    "callbacks.MFLossMonitor": "every step is logged",
    "callbacks.ObsMonitor": "it was a cloud platform's",
    "callbacks.CheckpointMonitor.prefix": "checkpoints are called step_N",
    "callbacks.CheckpointMonitor.integrated_save": "checkpoints are whole",
    "tensorboard.tensorboard_queue_size": "every step is written",
    "tensorboard.log_loss_scale_to_tensorboard": "everything is written",
    "tensorboard.log_timers_to_tensorboard": "everything is written",
    "model.model_config.repetition_penalty": "training generates nothing",
    "model.model_config.max_decode_length": "training generates nothing",
    "model.model_config.top_k": "training generates nothing",
    "model.model_config.top_p": "training generates nothing",
    "model.model_config.do_sample": "training generates nothing",
}

PREDICT_DEAD_KEYS: Mapping[str, str] = _ANY_RUN | {
    "eval_dataset": _NOT_TRAINING,
    "do_eval": _NOT_TRAINING,
    "eval_step_interval": _NOT_TRAINING,
    "eval_epoch_interval": _NOT_TRAINING,
    "runner_config": "prediction trains nothing",
    "runner_wrapper": "prediction trains nothing",
    "model.model_config.auto_map": "the tokenizer's file says what it is",
    "model.model_config.pet_config": "adapters are named on the command line, with --lora",
    "processor.type": "the tokenizer's file says what it is",
    "processor.return_tensors": "the engine takes token ids",
    "processor.tokenizer.type": "the tokenizer's file says what it is",
    "processor.tokenizer.auto_register": "the tokenizer's file says what it is",
    "processor.tokenizer.pad_token": "nothing is padded",
    "processor.tokenizer.model_max_length": "seq_length decides",
}
