"""The processes of a training job: one, or as many as torchrun started.

Beyond one process the model is sharded by FSDP2 (``fully_shard``), over NCCL on GPUs and gloo on
CPUs. A job whose processes do not all arrive ends with a message, not with a traceback.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from seodang.causal_lm import default_device
from seodang.errors import WorkFailed

PATIENCE = timedelta(minutes=30)  # for the slowest process
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|remote process|nccl|"
    r"failed to connect|read error|write error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Processes:
    """This process among its like: ``rank`` of ``count``, computing on ``device``."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def add(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; also waits for them."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def all_say(self, text: str) -> list[str]:
        """What each process says, in the order of their ranks."""
        if self.count == 1:
            return [text]
        data = text.encode()
        sizes = self.add([float(len(data) * (rank == self.rank)) for rank in range(self.count)])
        said = torch.zeros(self.count, max(1, int(max(sizes))), dtype=torch.uint8)
        said[self.rank, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        said = said.to(self.device)
        dist.all_reduce(said)
        rows = zip(said.cpu().numpy(), sizes, strict=True)
        return [row[: int(size)].tobytes().decode() for row, size in rows]

    def wait(self) -> None:
        """Wait until every process is here."""
        self.add([0.0])

    def shard(
        self,
        module: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        ignored: Sequence[torch.nn.Parameter] = (),
    ) -> None:
        """Shard ``module`` and each of its ``layers``, in place; gradients are averaged.

        ``ignored`` parameters stay as they are.
        """
        if self.count == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for part in (*layers, module):
            fully_shard(part, mesh=mesh, ignored_params=set(ignored) or None)


def whole_state(module: torch.nn.Module) -> dict[str, Any]:
    """The state of a sharded module, unsharded, on the CPU; empty but in the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def join() -> Iterator[Processes]:
    """Take part in the job that torchrun started, or be the only process.

    Raises ``WorkFailed`` in the processes that remain when another one ends before its time.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = default_device()
    if count == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    def lost(reason: str) -> WorkFailed:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is one sentence left to say
        return WorkFailed(
            f"process {rank} of {count} lost the others ({reason}): one of them ended. "
            "Start the same command again, with any number of processes, and it continues from "
            "the last checkpoint"
        )

    def told_to_stop(number: int, frame: Any) -> None:  # torchrun's word when another one ended
        raise lost("told to stop")

    before = signal.signal(signal.SIGTERM, told_to_stop)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=count,
            timeout=PATIENCE,
        )
        yield Processes(rank, count, device)
        signal.signal(signal.SIGTERM, before)
    except RuntimeError as error:
        if isinstance(error, WorkFailed) or not _LOST.search(str(error)):
            raise
        raise lost(_first_line(error)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:200]
