"""MindFormers' `run_llama3_1.py` under its old flags: predict, finetune or train with a YAML file.

    run_llama3_1.py --config predict_llama3_1_8b.yaml --run_mode predict --load_checkpoint llama3_1_8b.ckpt \\
        --vocab_file tokenizer.model --predict_data "I love Beijing, because"
    run_llama3_1.py --config finetune_llama3_1_8b.yaml --run_mode finetune --load_checkpoint model_dir --train_data DATA

`llama31-core predict` and `finetune` do the work; this file translates the flags into values of the YAML file. Prompts
are completed as they are, with no chat format. A flag that means nothing here is named in a warning with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama31_core.cli import main as run_core
from llama31_core.device import device_target

_OVERRIDES = {
    "load_checkpoint": "load_checkpoint",
    "auto_trans_ckpt": "auto_trans_ckpt",
    "use_parallel": "use_parallel",
    "seq_length": "model.model_config.seq_length",
    "dp": "parallel_config.data_parallel",
    "mp": "parallel_config.model_parallel",
    "pp": "parallel_config.pipeline_stage",
    "micro_batch_num": "parallel_config.micro_batch_num",
}
_OF_PREDICTION = {"vocab_file": "processor.tokenizer.vocab_file"}
_OF_TRAINING = {
    "train_dataset": "train_dataset.data_loader.dataset_dir",
    "eval_dataset": "eval_dataset.data_loader.dataset_dir",
    "resume": "resume_training",
}
_DEAD = {
    "mode": "one compiled graph computes",
    "src_strategy": "a checkpoint's layout is known without it",
    "remote_save_url": "it was a cloud platform's",
}
_DEAD_IN_PREDICTION = {
    "resume": "prediction trains nothing",
    "train_dataset": "prediction trains nothing",
    "eval_dataset": "prediction trains nothing",
}
_DEAD_IN_TRAINING = {
    "predict_data": "training completes no prompts",
    "max_length": "training completes no prompts",
    "vocab_file": "training data is token ids",
}


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_llama3_1.py", description="Predict or train with a YAML file.", allow_abbrev=False
    )
    parser.add_argument("--task", default="text_generation", choices=["text_generation"], help="the only one")
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("--run_mode", default="predict", choices=["predict", "finetune", "train"])
    parser.add_argument("--seq_length", type=int, help="tokens of a record, or of prompt and answer")
    parser.add_argument("--use_parallel", type=_as_bool, help="run on the devices of parallel_config")
    parser.add_argument("--device_id", type=int, help="which NPU, if one is used")
    parser.add_argument("--mode", type=int, choices=[0, 1], help="no effect")
    parser.add_argument("--load_checkpoint", help="a model directory or a weight file")
    parser.add_argument("--src_strategy", help="no effect")
    parser.add_argument("--auto_trans_ckpt", type=_as_bool, help="every rank reads its slices of any checkpoint")
    parser.add_argument("--resume", type=_as_bool, help="go on from the newest checkpoint of output_dir")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--train_dataset", help="a MindRecord file or a directory of them")
    data.add_argument("--train_data", dest="train_dataset", help="the same")
    parser.add_argument("--eval_dataset", help="the same, to evaluate on")
    parser.add_argument("--predict_data", nargs="+", help="prompts; or one text file with a prompt a line")
    parser.add_argument(
        "--max_length", type=int, help="tokens of prompt and answer, the engine's max_seq_len (max_decode_length)"
    )
    parser.add_argument("--remote_save_url", help="no effect")
    parser.add_argument("--vocab_file", help="tokenizer.model; of the directory of the weights if not given")
    parser.add_argument("--dp", type=int, help="data_parallel")
    parser.add_argument("--mp", type=int, help="model_parallel")
    parser.add_argument("--pp", type=int, help="pipeline_stage")
    parser.add_argument("--micro_batch_num", type=int, help="micro-batches of a pipeline")
    return parser


def overrides(arguments: argparse.Namespace) -> list[str]:
    """What the flags put over the values of the YAML file."""
    predicts = arguments.run_mode == "predict"
    keys = _OVERRIDES | (_OF_PREDICTION if predicts else _OF_TRAINING)
    values: dict[str, Any] = {key: getattr(arguments, name) for name, key in keys.items()}
    values["run_mode"] = arguments.run_mode
    if not predicts and arguments.eval_dataset is not None:
        values["do_eval"] = True
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]


def without_effect(arguments: argparse.Namespace) -> list[str]:
    """The flags that were given and mean nothing, each with the reason."""
    dead = _DEAD | (_DEAD_IN_PREDICTION if arguments.run_mode == "predict" else _DEAD_IN_TRAINING)
    if device_target() != "Ascend":
        dead = dead | {"device_id": "there is no NPU"}
    return [f"--{name} ({reason})" for name, reason in dead.items() if getattr(arguments, name) is not None]


def read_prompts(predict_data: Sequence[str]) -> list[str]:
    """The prompts; those of a file are its lines that are not empty."""
    if len(predict_data) > 1 or not Path(predict_data[0]).is_file():
        return list(predict_data)
    lines = Path(predict_data[0]).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def translate(arguments: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    """The `llama31-core` command line for the old one."""
    if arguments.run_mode != "predict":
        return ["finetune", arguments.config, *overrides(arguments)]
    command = ["predict", "--config", arguments.config, "--raw", "--echo"]
    command += [f"--set={override}" for override in overrides(arguments)]
    if arguments.max_length is not None:
        command += ["--max_tokens=none", f"--max_seq_len={arguments.max_length}"]
    return command + [f"--prompt={prompt}" for prompt in prompts]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return its exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    prompts = []
    if arguments.run_mode == "predict":
        if not arguments.predict_data:
            parser.error("--run_mode predict completes prompts; give --predict_data TEXT …, or a file with one a line")
        try:
            prompts = read_prompts(arguments.predict_data)
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--predict_data {arguments.predict_data[0]} cannot be read as text: {error}")
        if not prompts:
            parser.error(f"--predict_data {arguments.predict_data[0]} holds no prompt")
    dead = without_effect(arguments)
    if dead:
        print(f"WARNING: {len(dead)} flags have no effect here: {'; '.join(dead)}", file=sys.stderr)
    if arguments.device_id is not None and device_target() == "Ascend":
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = str(arguments.device_id)
    return run_core(translate(arguments, prompts))


if __name__ == "__main__":
    sys.exit(main())
