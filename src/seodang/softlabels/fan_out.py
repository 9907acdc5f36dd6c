"""Capture on many machines: shards as tasks of a Ray cluster.

A worker that dies takes nothing with it: Ray gives its task to another one, and a shard's bytes
do not depend on who made it. The teacher stays in each worker's memory from task to task.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, SeodangError, WorkFailed
from seodang.softlabels.labelling import Advance
from seodang.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from seodang.recipe import Precision
    from seodang.softlabels.capture import Wanted
    from seodang.softlabels.labelling import Teacher

IN_FLIGHT = 4  # shards under way or waiting, for each worker


def make_shards(
    address: str,
    teacher: Teacher,
    parts: Sequence[tuple[Sequence[TokenSequence], Sequence[Wanted]]],
    advance: Advance,
) -> Iterator[tuple[int, list[bytes]]]:
    """Each part's shard files as they are finished, in any order, with the number of the part.

    A part is its sequences and the stores that want their labels, see
    :func:`seodang.softlabels.capture.make_shard`.

    Raises ``InputError`` if Ray is not installed or nobody answers at ``address``, and what
    :func:`seodang.softlabels.capture.make_shard` raises in a worker.
    """
    ray = _connect(address)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # Ray reports a worker's death there
        stack.callback(ray.shutdown)
        threads = _threads(ray)
        make = ray.remote(num_cpus=threads, max_retries=-1)(_make)
        workers = max(1, int(ray.cluster_resources().get("CPU", 1) // threads))
        where = _address_of(teacher)
        waiting = list(range(len(parts)))[::-1]
        under_way: dict[Any, int] = {}
        while waiting or under_way:
            while waiting and len(under_way) < IN_FLIGHT * workers:
                number = waiting.pop()
                task = make.remote(where, *parts[number], threads)
                under_way[task] = number
            (finished,), _ = ray.wait(list(under_way), num_returns=1)
            number = under_way.pop(finished)
            try:
                result = ray.get(finished)
            except ray.exceptions.RayError as error:
                raise WorkFailed(
                    f"a worker of the Ray cluster failed: {error}; finished shards are kept"
                ) from None
            if isinstance(result, SeodangError):
                raise result
            yield number, result
            advance(sum(len(s.labelled) for s in parts[number][0]))


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise InputError(
            "fan-out needs Ray: pip install 'seodang[ray]', on the workers too"
        ) from None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a cluster started here tells nobody
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Ray cluster {address}: {error} (one that asks for a token needs RAY_AUTH_MODE=token)"
        ) from None
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise InputError(f"Ray cluster {address}: nobody answers there: {error}") from None


def _threads(ray: Any) -> int:
    """Threads of a worker: as many as this process has, so that sums are rounded alike."""
    import torch

    return min(torch.get_num_threads(), int(ray.cluster_resources().get("CPU", 1)))


def _address_of(teacher: Teacher) -> tuple[str, ...]:
    if isinstance(teacher, LocalTeacher):
        return (str(teacher.directory.resolve()), teacher.precision)
    return (teacher.server, teacher.model, str(teacher.directory))


@lru_cache(maxsize=1)
def _teacher(where: tuple[str, ...]) -> Teacher:
    if len(where) == 2:
        return LocalTeacher(Path(where[0]), cast("Precision", where[1]))
    from seodang.teacher.served import ServedTeacher

    return ServedTeacher.connect(where[0], where[1], Path(where[2]))


def _make(
    where: tuple[str, ...],
    sequences: Sequence[TokenSequence],
    wanted: Sequence[Wanted],
    threads: int,
) -> list[bytes] | SeodangError:
    """What a worker does. Its own errors come back as values: Ray would wrap them."""
    import torch

    from seodang.softlabels.capture import make_shard

    torch.set_num_threads(threads)
    try:
        return make_shard(_teacher(where), sequences, wanted, lambda tokens: None)
    except SeodangError as error:
        return error
