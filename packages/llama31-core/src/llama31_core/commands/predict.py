"""`llama31-core predict`: a prompt in, the model's answer out as it is generated."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    parser = commands.add_parser("predict", parents=[shared], help="complete a prompt")
    parser.add_argument("model_dir", type=Path, help="a model directory, as llama31-ckpt convert writes it")
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--raw", action="store_true", help="complete the prompt as it is, with no chat format")
    parser.add_argument("--add_bos_token", action="store_true", help="begin a raw prompt with the model's bos token")
    parser.add_argument("--max_tokens", type=int, default=256, help="tokens to generate at most (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (0)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among the k most likely tokens (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens up to p (1: all)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--max_seq_len", type=int, help="tokens of prompt and answer (what context and cache hold)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer as it is generated; figures go to stderr."""
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    tokenizer = Tokenizer.from_pretrained(arguments.model_dir)
    if arguments.raw:
        prompt = tokenizer.encode(arguments.prompt, bos=arguments.add_bos_token)
    else:
        messages = [{"role": "user", "content": arguments.prompt}]
        prompt = ChatFormat(tokenizer).encode_dialog(messages, add_generation_prompt=True).ids
    engine = Engine.from_pretrained(arguments.model_dir, max_seq_len=arguments.max_seq_len, max_batch_size=1)
    engine.add("predict", prompt, params)
    decoder = StreamDecoder(tokenizer)
    num_tokens, started = 0, time.perf_counter()
    while engine.has_unfinished():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            print(decoder.push(output.token_ids), end="", flush=True)
    print(decoder.flush())
    elapsed_s = time.perf_counter() - started
    print(f"{len(prompt)} prompt tokens, {num_tokens} generated in {elapsed_s:.1f} s", file=sys.stderr)
    return 0
