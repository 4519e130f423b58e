from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Direction, Hook, read_direction, write_direction


def test_a_direction_is_read_at_unit_norm_and_serves_its_projection(tmp_path: Path) -> None:
    path = tmp_path / "french.safetensors"
    save_file({"direction": torch.tensor([3.0, 0.0, -4.0])}, path, {"layer": "5", "hook": "resid_pre"})
    direction = read_direction(path)
    assert (direction.name, direction.hook) == ("french", Hook(5, "resid_pre"))
    x = torch.tensor([[1.0, 9.0, 0.0], [-1.0, 2.0, 0.0]])
    rows = direction.rows()
    torch.testing.assert_close(rows.activations(x), torch.tensor([[0.6], [-0.6]]))
    assert torch.equal(rows.encoder, rows.decoder)


def test_a_written_direction_is_read_back(tmp_path: Path) -> None:
    vector = torch.nn.functional.normalize(torch.randn(8), dim=0)
    direction = Direction("calm", vector, Hook(1, "resid_post"), {"max_activation": 3.5})
    write_direction(tmp_path / "calm.safetensors", direction)
    found = read_direction(tmp_path / "calm.safetensors")
    torch.testing.assert_close(found.vector, vector)
    assert (found.name, found.hook, dict(found.statistics)) == (
        "calm",
        direction.hook,
        {"max_activation": 3.5},
    )


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"direction": torch.zeros(4)}, {}),
        ({"direction": torch.tensor([1.0, float("nan")])}, {}),
        ({"direction": torch.ones(2, 2)}, {}),
        ({"vector": torch.ones(4)}, {}),
        ({"direction": torch.ones(4)}, {"layer": "x", "hook": "resid_post"}),
        ({"direction": torch.ones(4)}, {"layer": "1"}),
        ({"direction": torch.ones(4)}, {"layer": "1", "hook": "mlp_out"}),
        ({"direction": torch.ones(4)}, {"statistics": "[1]"}),
        ({"direction": torch.ones(4)}, {"statistics": '{"max_activation": Infinity}'}),
    ],
)
def test_a_bad_direction_is_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(CheckpointError):
        read_direction(tmp_path / "bad.safetensors")
