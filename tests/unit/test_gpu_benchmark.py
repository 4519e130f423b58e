from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.floor import least_bytes, least_microseconds


def test_without_an_nvidia_gpu_it_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("benchmarks.gpu: expected an NVIDIA GPU, but torch ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_its_help_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "results.json and plot.png" in capsys.readouterr().out


def test_the_floor_counts_each_plan_once_and_each_token_three_times() -> None:
    # 8 rows × (encoder + decoder) × 4096 × 4 bytes, and 3 × 4096 × 2 bytes a token.
    assert least_bytes(plans=1, rows=8, width=4096, tokens=1, itemsize=2) == 262_144 + 24_576
    assert least_bytes(plans=1, rows=8, width=4096, tokens=256, itemsize=2) == 262_144 + 256 * 24_576
    assert least_bytes(plans=256, rows=8, width=4096, tokens=256, itemsize=2) == 256 * (262_144 + 24_576)
    assert least_bytes(plans=0, rows=8, width=4096, tokens=0, itemsize=2) == 0


def test_a_floor_is_bytes_over_bandwidth() -> None:
    assert least_microseconds(4_300_000, 4.3e12) == pytest.approx(1.0)
