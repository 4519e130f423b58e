"""Data-parallel harvesting: an engine for each replica, each on its own devices and every n-th text.

The engines share nothing: no step of one waits for another. What they wrote is joined when all are done.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

from steerserve.errors import ConfigError, SteerserveError
from steerserve.training.part import Part, check_parts, join_parts
from steerserve.training.shard_file import INDEX

from .harvest_progress import Report, progress_bars

__all__ = ["harvest_replicas", "replica_devices", "reporting"]

_CORES = "VLLM_CPU_OMP_THREADS_BIND"
_GPUS = "CUDA_VISIBLE_DEVICES"


def harvest_replicas(
    command: Sequence[str], replicas: int, devices: int, folders: Sequence[Path], total: int | None
) -> int:
    """Run a command for each replica that is not done yet, and join what they wrote.

    Args:
        command: of a whole harvest; a replica gets `--replica` and `--report-to` besides.
        devices: GPUs (or, on the CPU, processes with cores of their own) of one replica.
        folders: of each layer's shards. total: bytes of the corpus.
    Returns: how many activations there are, of all layers.
    Raises: ConfigError if there are too few devices, or the folders hold another harvest; SteerserveError if
        a replica failed, which has said why: the others are ended, and the same command goes on there.
    """
    for folder in folders:
        check_parts(folder, replicas)
    if all((folder / INDEX).exists() for folder in folders):
        raise ConfigError(
            f"expected an unfinished harvest or a new folder, {folders[0]} holds a whole harvest"
        )
    parts = [Part(number, replicas) for number in range(replicas)]
    todo = [part for part in parts if not _is_whole(part, folders)]
    own = replica_devices(replicas, devices)
    with progress_bars([f"replica {part.number}" for part in todo], total) as show:
        _run([_Replica(command, part, own[part.number]) for part in todo], show)
    return sum(join_parts(folder, replicas) for folder in folders)


def replica_devices(replicas: int, devices: int) -> list[dict[str, str]]:
    """The environment that gives each replica devices of its own.

    Raises: ConfigError if there are too few.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        given = os.environ.get(_CORES, "auto")
        cores = given.split("|") if given not in ("auto", "all", "nobind") else _divided(replicas * devices)
        return _shared_out(cores, replicas, devices, _CORES, "|", "sets of cores")
    visible = os.environ.get(_GPUS)
    gpus = visible.split(",") if visible else [str(i) for i in range(current_platform.device_count())]
    return _shared_out(gpus, replicas, devices, _GPUS, ",", "GPUs")


@contextmanager
def reporting(descriptor: int | None) -> Iterator[Callable[[Report], None] | None]:
    """In a replica: what passes its reports on to the process that started it. None where there is none."""
    if descriptor is None:
        yield None
        return
    # The engine's processes would keep it open.
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as pipe:
        yield lambda report: print(json.dumps(report._asdict()), file=pipe)


class _Replica:
    """A process that harvests one part."""

    def __init__(self, command: Sequence[str], part: Part, devices: Mapping[str, str]) -> None:
        self.part = part
        receiver, sender = os.pipe()
        more = ["--replica", str(part.number), "--report-to", str(sender)]
        self.process = subprocess.Popen(
            [*command, *more],
            env={**os.environ, **devices},
            pass_fds=[sender],
            stdin=subprocess.DEVNULL,
            # Its own summary would be one of a part.
            stdout=subprocess.DEVNULL,
        )
        os.close(sender)
        self._reports: IO[str] = os.fdopen(receiver, encoding="utf-8")

    def follow(self, show: Callable[[Report], None]) -> int:
        """Show every report; returns the exit code once the process has ended."""
        with self._reports:
            for line in self._reports:
                show(Report(**json.loads(line)))
        return self.process.wait()


def _is_whole(part: Part, folders: Sequence[Path]) -> bool:
    return all((part.folder(folder) / INDEX).exists() for folder in folders)


def _divided(count: int) -> list[str]:
    """The cores that this process may use, divided among `count` processes; none, if they do not suffice."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return []
    edges = [len(cores) * i // count for i in range(count + 1)]
    return [",".join(map(str, cores[a:b])) for a, b in pairwise(edges)]


def _shared_out(
    found: Sequence[str], replicas: int, devices: int, name: str, separator: str, what: str
) -> list[dict[str, str]]:
    if len(found) < replicas * devices:
        raise ConfigError(f"expected {replicas * devices} {what} for {replicas} replicas, got {len(found)}")
    return [{name: separator.join(found[i * devices : (i + 1) * devices])} for i in range(replicas)]


def _run(replicas: Sequence[_Replica], show: Callable[[int, Report], None]) -> None:
    """Until all have ended; the first that fails ends the others."""
    with ThreadPoolExecutor(max(1, len(replicas))) as pool:
        following = {
            pool.submit(replica.follow, partial(show, place)): replica
            for place, replica in enumerate(replicas)
        }
        try:
            for done in as_completed(following):
                part, code = following[done].part, done.result()
                if code != 0:
                    raise SteerserveError(
                        f"expected replica {part.number} of {part.of} to finish, it ended with exit code "
                        f"{code}; whole shards stay, and the same command goes on behind them"
                    )
        finally:
            for replica in replicas:
                replica.process.terminate()
