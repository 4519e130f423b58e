"""What a run measured, step by step: JSON lines that survive a kill, and TensorBoard on request."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from steerserve.errors import ConfigError

from .run import Progress

__all__ = ["LOG", "TrainingLog", "lines_of"]

LOG = "training.jsonl"


class TrainingLog:
    """Appends one line for each SAE and report.

    Keys: sae, step, loss, l0, explained_variance, dead_share, lr, tokens_per_second.

    Args:
        path: the file; lines of a killed run beyond `start` are dropped, for those steps are made again.
        names: of the SAEs. start: the step the run goes on from. batch_size: tokens per step.
        tensorboard: a folder for TensorBoard's events; none are written if not given.
    Raises: ConfigError if TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: Path, names: list[str], start: int, batch_size: int, tensorboard: Path | None = None
    ) -> None:
        kept = [line for line in _lines(path) if line["step"] <= start]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._names, self._batch = names, batch_size
        self._writers = [_writer(tensorboard / name, start) for name in names] if tensorboard else []
        self._last = (start, time.monotonic())
        self.tokens_per_second = 0.0

    def write(self, number: int, progress: Progress) -> None:
        """One SAE's report."""
        if number == 0:
            step, began = self._last
            now = time.monotonic()
            if now > began and progress.done > step:
                self.tokens_per_second = (progress.done - step) * self._batch / (now - began)
            self._last = (progress.done, now)
        values = asdict(progress)
        step = values.pop("done")
        values["tokens_per_second"] = round(self.tokens_per_second, 1)
        self._file.write(json.dumps({"sae": self._names[number], "step": step, **values}) + "\n")
        if self._writers:
            for name, value in values.items():
                self._writers[number].add_scalar(name, value, step)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, _: type[BaseException] | None, __: object, ___: TracebackType | None) -> None:
        self._file.close()
        for writer in self._writers:
            writer.close()


def lines_of(path: Path, name: str) -> str:
    """The part of a log that is about one SAE."""
    return "".join(json.dumps(line) + "\n" for line in _lines(path) if line["sae"] == name)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a kill may have cut the last."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("expected the package tensorboard for --tensorboard: pip install it") from None
    return SummaryWriter(str(folder), purge_step=start + 1)
