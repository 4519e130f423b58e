"""Training on a harvest while it runs: no more of it is ever on disk than is about to be read."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steerserve.errors import ConfigError
from steerserve.training.corpus import Corpus
from steerserve.training.stream import LeftError, ShardStream

from .harvester import Harvester

__all__ = ["stream"]

_ROWS_PER_SHARD = 8192


@contextmanager
def stream(
    harvester: Harvester,
    prompts: Corpus | Iterable[list[int] | str],
    rows: int,
    *,
    ahead: int = 65_536,
    folder: Path | None = None,
) -> Iterator[ShardStream]:
    """Harvest one layer in a thread, to a folder that is gone in the end, and give what reads it.

    Args:
        harvester: of one layer; nothing else may be asked of it meanwhile.
        prompts: see `Harvester.run`.
        rows: how many activations will be read, those kept for evaluation among them.
        ahead: how many may wait on disk, beside a batch of the engine.
        folder: the shards go to a new folder below it; by default to one for temporary files.
    Raises: ConfigError for several layers; what goes wrong in the harvest is raised where it is read.
    """
    if len(harvester.points.layers) > 1:
        raise ConfigError(f"expected one layer to stream, got {list(harvester.points.layers)}")
    with tempfile.TemporaryDirectory(prefix="steerserve-stream-", dir=folder) as place:
        source = ShardStream(Path(place), rows, ahead)
        thread = threading.Thread(target=_write, args=(harvester, prompts, source), name="harvest")
        thread.start()
        try:
            yield source
        finally:
            source.leave()
            thread.join()


def _write(harvester: Harvester, prompts: Corpus | Iterable[list[int] | str], source: ShardStream) -> None:
    def hold_back(_: object) -> None:
        source.hold_back()

    try:
        harvester.run(prompts, source.folder, rows_per_shard=_ROWS_PER_SHARD, report=hold_back)
    except LeftError:
        source.end()
    except BaseException as error:
        source.end(error)
    else:
        source.end()
