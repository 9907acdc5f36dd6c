"""A real vLLM server on this machine's CPU, from the environment that `make vllm` builds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

PYTHON = Path(__file__).parents[2] / ".vllm" / "bin" / "python"
START_SECONDS = 400

# Its own rotary kernel is wrong on CPUs for some models (A.X K1): PyTorch's is right.
RIGHT_ROTARY = ("--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}')


class VllmServer:
    """Serves ``directory`` as ``served`` in float32; a context manager. Only one at a time."""

    def __init__(self, directory: Path, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self.command = [
            *("nice", "-n", "10", str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(directory), "--served-model-name", "served", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--max-model-len", "256", "--max-logprobs", "20", "--enforce-eager", *flags),
        ]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # else it leaves one core out
            "OMP_NUM_THREADS": str(len(cores)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def _healthy(self) -> bool:
        address = self.address.removesuffix("/v1")
        try:
            return httpx.get(f"{address}/health", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End the server and its workers as a crash does, without a chance to say goodbye."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End the server and its workers."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
