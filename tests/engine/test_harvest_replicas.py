"""Data-parallel harvesting by the command, on two CPU replicas with a core each."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steerserve.errors import ConfigError
from steerserve.training.shard_file import INDEX, Rows
from steerserve.training.shards import ShardReader
from steerserve_vllm.harvest_replicas import harvest_replicas, replica_devices
from tests.engine.harvesting import LAYERS, fingerprints, start_command
from tests.support.engine import random_prompts

# More than one batch of the engine for each replica, so that one can be killed between two.
PROMPTS = random_prompts(1500, [5, 40, 110], seed=53)
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


def engine_cores(command: int) -> list[int]:
    """The engine cores that the replicas of a command have started."""
    replicas, found = replica_pids(command).values(), []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            above = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if above in replicas and b"EngineCore" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def has_ended(handle: int, within: float) -> bool:
    """Whether a process ends within so many seconds. Args: handle: of pidfd_open."""
    ready, *_ = select.select([handle], [], [], within)
    os.close(handle)
    return bool(ready)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_replicas_write_what_transformers_computes_also_when_one_of_them_is_killed(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = [" ".join(f"w{token}" for token in prompt[1:]) for prompt in PROMPTS]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    model, corpus, out, said = models("llama"), tmp_path / "a.txt", tmp_path / "out", tmp_path / "said"
    replicas = ("--data-parallel-size", "2")

    # Before the engines are up, nothing that a harvest says has reached them.
    with start_command(model, corpus, out, *replicas, said=said) as command:
        while len(engines := engine_cores(command.pid)) < 2:
            assert command.poll() is None, said.read_text()
            time.sleep(0.02)
        handles = [os.pidfd_open(pid) for pid in engines]
        os.kill(replica_pids(command.pid)[1], signal.SIGKILL)
        assert command.wait() == 2
    # Neither those of the one that was killed, nor of the other, which the command ended.
    assert all(has_ended(handle, within=120) for handle in handles)

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
    assert not (first.parent / INDEX).exists()

    with start_command(model, corpus, out, *replicas, said=said) as command:
        assert command.wait() == 0, said.read_text()
    assert stored.items() <= fingerprints(out).items()

    folders = [out / f"resid_post.{layer}" for layer in LAYERS]
    for layer, folder in zip(LAYERS, folders, strict=True):
        reader = ShardReader(folder)
        assert reader.complete
        check_against_transformers(model, layer, by_sequence(reader[:]))
        (folder / INDEX).unlink()
    # Every part is whole: nothing is started any more.
    assert harvest_replicas(["no such command"], 2, 1, folders, None) == len(LAYERS) * TOKENS


def check_against_transformers(model: Path, layer: int, rows: Rows) -> None:
    """Every ordinary token once, and the activations of the first sequences."""
    assert rows.tokens.tolist() == [token for prompt in PROMPTS for token in prompt[1:]]
    assert rows.sequence.tolist() == [i for i, prompt in enumerate(PROMPTS) for _ in prompt[1:]]
    assert rows.position.tolist() == [place for prompt in PROMPTS for place in range(1, len(prompt))]
    reference = AutoModelForCausalLM.from_pretrained(model).float().eval()
    with torch.no_grad():
        hidden = [
            reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer + 1][0, 1:]
            for prompt in PROMPTS[:40]
        ]
    wanted = torch.cat(hidden)
    torch.testing.assert_close(rows.activations[: len(wanted)], wanted, rtol=1e-4, atol=1e-3)


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
