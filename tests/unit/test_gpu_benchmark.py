from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import lease
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.floor import least_bytes, least_microseconds
from benchmarks.gpu.lease import Stage


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


def stage(name: str, *words: str, seconds: float = 30.0) -> Stage:
    return Stage(name, seconds, words)


def test_a_stage_that_hangs_or_fails_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages = (
        stage("hangs", "-c", hangs, seconds=1.0),
        stage("fails", "-c", "raise SystemExit('the kernel is wrong')"),
        stage("tells", "-c", "print('warming up'); print('{\"checked\": 3}')"),
        Stage("lacks", 5.0, ("-c", ""), needs="no-such-sanitizer"),
    )
    monkeypatch.setattr(lease, "STAGES", stages)
    monkeypatch.setattr(lease, "_command", lambda stage, out, rehearse: [sys.executable, *stage.words])
    began = time.monotonic()
    assert lease.main(["--out", str(tmp_path)]) == 1
    assert time.monotonic() - began < 30
    told = json.loads((tmp_path / "lease.json").read_text())
    assert [one["status"] for one in told] == ["timeout", "failed", "ok", "absent"]
    assert "the kernel is wrong" in told[1]["said"]
    assert told[2]["found"] == {"checked": 3}


def test_the_stages_fit_into_a_quarter_of_an_hour_and_what_comes_back_is_few_files() -> None:
    assert [one.name for one in lease.STAGES] == [
        "start", "kernels", "schedule", "replay", "waits", "sanitizer", "measure",
    ]  # fmt: skip
    assert sum(one.seconds for one in lease.STAGES) <= 10 * 60


@pytest.mark.parametrize(
    "name",
    ["start", "waits", *(pytest.param(n, marks=pytest.mark.slow) for n in ("kernels", "schedule", "replay"))],
)
def test_a_stage_is_rehearsed_where_there_is_no_gpu(tmp_path: Path, name: str) -> None:
    assert lease.main(["--out", str(tmp_path), "--rehearse", "--stage", name]) == 0, (
        tmp_path / "lease.json"
    ).read_text()
    (told,) = json.loads((tmp_path / "lease.json").read_text())
    assert told["found"]


def test_the_stages_need_nothing_that_the_machine_has_not_and_no_wheel_brings() -> None:
    lacking = [
        "cryptography",
        "fastapi",
        "hypothesis",
        "prometheus_client",
        "sae_lens",
        "typer",
        "vllm",
        "xdist",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
        "import benchmarks.gpu.replaying, benchmarks.gpu.stages, benchmarks.gpu.kernel, benchmarks.gpu.loop\n"
        "import benchmarks.machine, benchmarks.command, steerserve.runtime.device, tests.unit.test_history\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=lease.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
