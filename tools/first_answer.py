"""Asks a real model a question over gRPC: gets SmolLM2-135M-Instruct, converts it, serves it, prints its answer.

The second half of tools/quickstart, which runs it in a venv that has the packages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llama31_serve import Client
from llama31_serve.errors import ServeError
from model_assets import AssetError, cache_root, fetch

QUESTION = "What is the capital of France?"
MODEL_NAME = "smollm2-135m-instruct"
DEFAULT_PORT = 50051
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40
ANSWER_TIMEOUT_S = 120
NEEDED_BYTES = 1_000_000_000  # the download, the converted model, and room to write it


class QuickstartError(Exception):
    """What went wrong and what to do about it, in one sentence."""


class ServerInterruptedError(Exception):
    """The user ended it while a server was there, which is stopped by now."""


def main() -> int:
    """Get a model, serve it on loopback and ask it something."""
    parser = argparse.ArgumentParser(prog="tools/quickstart", description=main.__doc__)
    parser.add_argument("--prompt", default=QUESTION, help=f"what to ask ({QUESTION!r})")
    parser.add_argument("--keep", action="store_true", help="leave the server running and show how to call it")
    parser.add_argument("--port", type=int, help=f"port to serve on (any free one; with --keep {DEFAULT_PORT})")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    try:
        port = pick_port(arguments.port, keep=arguments.keep)
        model_dir = ensure_model()
        with running_server(model_dir, port) as server:
            ask(server.port, arguments.prompt)
            if arguments.keep:
                server.keep()
                show_clients(server.port, server.process.pid)
    except (QuickstartError, AssetError, ServeError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except ServerInterruptedError:
        return interrupted("; the server is stopped")
    except KeyboardInterrupt:
        return interrupted()
    return 0


def interrupted(outcome: str = "") -> int:
    """Say so, unless the terminal has gone, and give the exit status."""
    with contextlib.suppress(OSError):
        print(f"\nquickstart: interrupted{outcome}", file=sys.stderr)
    return 130


def pick_port(wanted: int | None, *, keep: bool) -> int:
    """The port to serve on, known to be free now, so that a taken one is told before anything is downloaded."""
    port = wanted if wanted is not None else DEFAULT_PORT if keep else 0
    if not 0 <= port <= 65535:
        raise QuickstartError(f"--port is {port}, allowed is 0 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise QuickstartError(f"port {port} cannot be used ({error.strerror}); give another with --port") from error
        return int(probe.getsockname()[1])


def ensure_model() -> Path:
    """The model directory in the user's cache, made if it is not there or not whole."""
    model_dir = cache_root() / "models" / MODEL_NAME
    if is_whole(model_dir):
        return model_dir
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"the cache {cache_root()} cannot be made ({error.strerror}); set LLAMA31_CACHE to a directory"
        raise QuickstartError(problem) from error
    free = shutil.disk_usage(cache_root()).free
    if free < NEEDED_BYTES:
        raise QuickstartError(
            f"{cache_root()} has {free / 1e6:.0f} MB free, the model needs {NEEDED_BYTES / 1e6:.0f} MB; "
            f"free some space or set LLAMA31_CACHE"
        )
    print("Getting SmolLM2-135M-Instruct (93 MB, Apache-2.0) …", flush=True)
    gguf = fetch("smollm2-gguf")
    print(f"Converting it to {model_dir} …", flush=True)
    converter = Path(sys.executable).with_name("llama31-ckpt")
    options = ["--input_path", str(gguf), "--output_path", str(model_dir), "--dtype", "fp32", "--overwrite"]
    if subprocess.run([converter, "convert", *options], check=False).returncode != 0:
        raise QuickstartError(f"the conversion of {gguf.name} failed; the line above says why")
    return model_dir


def is_whole(model_dir: Path) -> bool:
    """Whether every file of the manifest is there in its size."""
    try:
        files = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((model_dir / name).stat().st_size == entry["size_bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Server:
    """A `llama31-serve start` process of ours."""

    def __init__(self, model_dir: Path, port: int) -> None:
        self.port = port
        self.log = tempfile.NamedTemporaryFile(prefix="llama31-serve-", suffix=".log", delete=False)  # noqa: SIM115
        program = Path(sys.executable).with_name("llama31-serve")
        self.process = subprocess.Popen(
            [program, "start", "--model", model_dir, "--port", str(port)],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this program alone, which stops the server in order
        )
        self._kept = False

    def keep(self) -> None:
        """Leave it running."""
        self._kept = True

    def wait_until_ready(self) -> None:
        """Wait for the health service to say SERVING, with a dot every second."""
        print("Starting llama31-serve (about 6 s, some 20 more where its kernels are compiled) ", end="", flush=True)
        started = time.monotonic()
        with Client(f"127.0.0.1:{self.port}", timeout_s=2) as client:
            while time.monotonic() - started < READY_TIMEOUT_S:
                if self.process.poll() is not None:
                    raise QuickstartError(f"the server did not start: {self._last_line()} (log: {self.log.name})")
                with contextlib.suppress(ServeError):
                    if client.is_serving(timeout_s=1):
                        print(f" {time.monotonic() - started:.0f} s", flush=True)
                        return
                print(".", end="", flush=True)
                time.sleep(1)
        raise QuickstartError(f"the server was not ready after {READY_TIMEOUT_S} s; its log is {self.log.name}")

    def stop(self) -> None:
        """End it with SIGTERM and check that it went in order."""
        self.log.close()
        if self._kept:
            return
        self.process.terminate()
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            problem = f"the server did not stop in {STOP_TIMEOUT_S} s; its log is {self.log.name}"
            raise QuickstartError(problem) from None
        if code != 0:
            raise QuickstartError(f"the server ended with code {code}: {self._last_line()} (log: {self.log.name})")
        os.unlink(self.log.name)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def discard(self) -> None:
        """End it at once and leave no log: the user interrupted, and one more signal must not stop this."""
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.SIG_IGN)
        self.kill()
        self.log.close()
        Path(self.log.name).unlink(missing_ok=True)

    def _last_line(self) -> str:
        lines = Path(self.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def running_server(model_dir: Path, port: int) -> Iterator[Server]:
    """A server that is ready, and stopped at the end unless it is kept."""
    server = Server(model_dir, port)
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    except KeyboardInterrupt:
        server.discard()
        raise ServerInterruptedError from None
    except BaseException:
        server.kill()
        raise


def ask(port: int, prompt: str) -> None:
    """Print the answer token by token."""
    print(f"\n> {prompt}")
    with Client(f"127.0.0.1:{port}", timeout_s=ANSWER_TIMEOUT_S) as client:
        messages = [{"role": "user", "content": prompt}]
        with client.chat_stream(messages, temperature=0, max_tokens=256) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        result = stream.result
    if result is not None:
        usage = result.usage
        print(f"\n\n{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} generated", flush=True)


def show_clients(port: int, pid: int) -> None:
    """How to call the server that was left running."""
    print(f"""
The server goes on (process {pid}; stop it with: kill {pid}). In Python, from .venv:

    from llama31_serve import Client

    with Client("127.0.0.1:{port}", timeout_s=60) as client:
        with client.chat_stream([{{"role": "user", "content": "{QUESTION}"}}], temperature=0) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)

From a shell:

    grpcurl -plaintext -d '{{"request": {{"messages": [{{"role": "user", "content": "{QUESTION}"}}]}}}}' \\
        127.0.0.1:{port} llama31.inference.v1.InferenceService/ChatStream
""")


if __name__ == "__main__":
    raise SystemExit(main())
