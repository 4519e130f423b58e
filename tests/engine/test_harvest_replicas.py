"""Data-parallel harvesting by the command, on two CPU replicas with a core each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steerserve.config import HarvestPoints
from steerserve.errors import ConfigError
from steerserve.training.corpus import open_corpus
from steerserve.training.shard_file import Rows
from steerserve.training.shards import ShardReader
from steerserve_vllm.harvest_replicas import harvest_replicas, replica_devices
from steerserve_vllm.harvester import Harvester
from tests.engine.harvesting import ENGINE, LAYERS, fingerprints, start_command
from tests.support.engine import random_prompts

PROMPTS = random_prompts(150, [5, 40, 110], seed=53)
TOKENS = sum(len(prompt) - 1 for prompt in PROMPTS)


def by_sequence(rows: Rows) -> Rows:
    order = torch.argsort(rows.sequence.long() * 2**20 + rows.position)
    return Rows(*(column[order] for column in rows))


def replica_pids(parent: int) -> dict[int, int]:
    """The processes of the replicas by their numbers."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
            above = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if above == parent and "--replica" in words:
            found[int(words[words.index("--replica") + 1])] = int(place.name)
    return found


@pytest.mark.timeout(900)
def test_two_replicas_write_what_one_engine_writes_also_when_one_of_them_is_killed(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = [" ".join(f"w{token}" for token in prompt[1:]) for prompt in PROMPTS]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    model, corpus, out, said = models("llama"), tmp_path / "a.txt", tmp_path / "out", tmp_path / "said"
    replicas = ("--data-parallel-size", "2")

    with start_command(model, corpus, out, *replicas, said=said) as command:
        first = out / "resid_post.1" / "part-1-of-2" / "shard-00000.safetensors"
        while not first.exists():
            assert command.poll() is None, said.read_text()
            time.sleep(0.02)
        os.kill(replica_pids(command.pid)[1], signal.SIGKILL)
        assert command.wait() == 2
    assert "expected replica 1 of 2 to finish" in said.read_text()
    stored = {name: value for name, value in fingerprints(out).items() if "/shard" in name}
    assert any("part-1-of-2" in name for name in stored)

    with start_command(model, corpus, out, *replicas, said=said) as command:
        assert command.wait() == 0, said.read_text()
    assert stored.items() <= fingerprints(out).items()

    with Harvester(str(model), HarvestPoints(layer=LAYERS), **ENGINE) as one:
        one.run(open_corpus(corpus), tmp_path / "one")
        # Neither goes on where the other was.
        for folder in (out / f"resid_post.{layer}" for layer in LAYERS):
            (folder / "index.json").unlink()
        with pytest.raises(ConfigError, match=r"in 1 part, .* holds one of 2"):
            one.run(open_corpus(corpus), out, resume=True)
    # Every part is whole: nothing is started any more.
    folders = [out / f"resid_post.{layer}" for layer in LAYERS]
    assert harvest_replicas(["no such command"], 2, 1, folders, None) == len(LAYERS) * TOKENS
    for layer in LAYERS:
        reader = ShardReader(out / f"resid_post.{layer}")
        found, wanted = (
            by_sequence(rows[:]) for rows in (reader, ShardReader(tmp_path / "one" / f"resid_post.{layer}"))
        )
        assert reader.complete
        for one_column, other in zip(found[1:], wanted[1:], strict=True):
            assert torch.equal(one_column, other)
        torch.testing.assert_close(found.activations, wanted.activations, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "replicas", "devices", "wanted"),
    [
        ("0|1", 2, 1, ["0", "1"]),
        ("0,1|2,3|4,5|6,7", 2, 2, ["0,1|2,3", "4,5|6,7"]),
    ],
)
def test_each_replica_gets_cores_of_its_own(
    given: str, replicas: int, devices: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.setenv(name, given)
    assert replica_devices(replicas, devices) == [{name: cores} for cores in wanted]
    with pytest.raises(ConfigError, match=f"sets of cores for {replicas + 1} replicas"):
        replica_devices(replicas + 1, devices)


def test_without_a_choice_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 3, 5, 7})
    assert [found["VLLM_CPU_OMP_THREADS_BIND"] for found in replica_devices(2, 1)] == ["0,2", "3,5,7"]
    with pytest.raises(ConfigError, match="expected 6 sets of cores for 3 replicas"):
        replica_devices(3, 2)
