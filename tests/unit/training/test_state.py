from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError, ConfigError
from steerserve.training.state import load_state, save_state


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1, 2]), "c": torch.randn(2, dtype=torch.float64)}
    save_state(tmp_path / "run", tensors, "this run")
    found = load_state(tmp_path / "run", "this run")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "run", {"a": torch.zeros(1)}, "that run")
    with pytest.raises(ConfigError, match="remove it"):
        load_state(tmp_path / "run", "this run")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_state(path, {"a": torch.zeros(100)}, "this run")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="whole"):
        load_state(path, "this run")
