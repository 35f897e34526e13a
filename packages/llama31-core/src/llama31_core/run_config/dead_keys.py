"""MindFormers' keys that mean nothing here, each with the reason."""

# MindFormers' keys that have no meaning here, by dotted name; a section's name covers all that is in it.
DEAD_KEYS = {
    "src_strategy_path_or_dir": "a rank reads its slices of any checkpoint, so the source's layout is not asked for",
    "only_save_strategy": "layouts come from a table and need no saving",
    "trainer": "there is one trainer",
    "runner_config.sink_mode": "data is fed step by step",
    "runner_config.sink_size": "data is fed step by step",
    "train_dataset.python_multiprocessing": "records are ready-made and no Python runs per record",
    "train_dataset.batch_size": "runner_config.batch_size decides",
    "train_dataset.numa_enable": "the operating system places the workers",
    "train_dataset.prefetch_size": "MindSpore's default serves",
    "train_dataset_task": "it repeats train_dataset",
    "runner_wrapper.type": "there is one training step",
    "model.arch": "there is one architecture",
    "model.model_config.type": "there is one architecture",
    "model.model_config.batch_size": "batches are as large as runner_config.batch_size says",
    "model.model_config.use_past": "training keeps no cache",
    "model.model_config.use_flash_attention": "the device decides",
    "model.model_config.checkpoint_name_or_path": "load_checkpoint decides",
    "auto_tune": "it was a MindFormers tool",
    "filepath_prefix": "it was a MindFormers tool",
    "autotune_per_step": "it was a MindFormers tool",
    "remote_save_url": "it was a cloud platform's",
}
