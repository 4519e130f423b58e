"""What harvesting writes is the stream that Hugging Face computes, token by token, whatever interrupts it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steerserve.config import HarvestPoints
from steerserve.errors import ConfigError, IncompatibleError, SteerserveError
from steerserve.training.corpus import open_corpus
from steerserve.training.shard_file import INDEX, Rows
from steerserve.training.shards import ShardReader
from steerserve_vllm.harvest_progress import Report
from steerserve_vllm.harvester import Harvester
from steerserve_vllm.streaming import stream
from tests.engine.harvesting import ENGINE, LAYERS, LONGEST, fingerprints, start_command
from tests.support.engine import random_prompts
from tests.support.forking import interpret
from tests.support.models import BOS, N_LAYERS
from tests.support.one import OneAtATime
from tests.support.times import starting

PROMPTS = random_prompts(40, [5, 40, 110], seed=51)
RUN: dict[str, Any] = {"batch": 8, "rows_per_shard": 400}


@pytest.fixture(scope="module")
def hollow(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies of the small models whose layers behind the deepest harvested one hold nothing but NaN."""
    parent = tmp_path_factory.mktemp("hollow")

    def model(family: str) -> Path:
        folder = parent / family
        if folder.exists():
            return folder
        shutil.copytree(models(family), folder)
        weights = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            if any(f".{layer}." in name for layer in range(max(LAYERS) + 1, N_LAYERS)):
                weight.fill_(float("nan"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return model


@pytest.fixture(scope="module")
def harvester(running: OneAtATime, hollow: Callable[[str], Path]) -> Harvester:
    return running.get("harvester", lambda: start(hollow("llama"), HarvestPoints(layer=LAYERS)))


@contextmanager
def start(model: Path, points: HarvestPoints, **more: Any) -> Iterator[Harvester]:
    with starting():
        started = Harvester(str(model), points, **(ENGINE | more))
    with started:
        yield started


@pytest.fixture(scope="module")
def whole(harvester: Harvester, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest of PROMPTS that nothing interrupted."""
    folder = tmp_path_factory.mktemp("harvest") / "whole"
    rows = sum(len(prompt) - 1 for prompt in PROMPTS)
    assert harvester.run(PROMPTS, folder, **RUN) == len(LAYERS) * rows
    return folder


def read(folder: Path) -> Rows:
    return ShardReader(folder)[:]


def check_against_transformers(model: Path, prompts: list[list[int]], layer: int, rows: Rows) -> None:
    """Every ordinary token once, in order, with the activations that the sound model has there."""
    reference = AutoModelForCausalLM.from_pretrained(model).float().eval()
    hidden: list[torch.Tensor] = []
    for prompt in prompts:
        assert prompt[0] == BOS
        with torch.no_grad():
            states = reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        hidden.append(states[layer + 1][0, 1:])
    assert rows.tokens.tolist() == [token for prompt in prompts for token in prompt[1:]]
    assert rows.sequence.tolist() == [i for i, prompt in enumerate(prompts) for _ in prompt[1:]]
    assert rows.position.tolist() == [place for prompt in prompts for place in range(1, len(prompt))]
    torch.testing.assert_close(rows.activations, torch.cat(hidden), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_holds_what_transformers_computes_though_no_later_layer_is_run(
    layer: int, whole: Path, models: Callable[[str], Path]
) -> None:
    folder = whole / f"resid_post.{layer}"
    reader = ShardReader(folder)
    assert (reader.complete, reader.hook.layer, reader.hook.site) == (True, layer, "resid_post")
    check_against_transformers(models("llama"), PROMPTS, layer, reader[:])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_harvest_cut_short_goes_on_to_the_same_files(
    kept: int, harvester: Harvester, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    for number, layer in enumerate(LAYERS):
        shards = folder / f"resid_post.{layer}"
        (shards / INDEX).unlink()
        # One layer was a shard ahead of the other.
        for path in sorted(shards.glob("shard-*"))[kept + number :]:
            path.unlink()
        (shards / ".shard-00001.safetensors.part").write_bytes(b"half of a shard")
    harvester.run(PROMPTS, folder, resume=True, **RUN)
    for shards in folder.iterdir():
        (shards / ".shard-00001.safetensors.part").unlink(missing_ok=True)
    assert fingerprints(folder) == fingerprints(whole)


def test_a_harvest_is_not_continued_with_other_texts(
    harvester: Harvester, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    for index in folder.rglob(INDEX):
        index.unlink()
    changed = [[*prompt[:-1], 3 + prompt[-1] % 300] for prompt in PROMPTS]
    with pytest.raises(SteerserveError, match="same texts"):
        harvester.run(changed, folder, resume=True, **RUN)
    assert len(read(folder / "resid_post.0").tokens) == len(read(whole / "resid_post.0").tokens)


def test_a_finished_harvest_is_not_touched(harvester: Harvester, whole: Path) -> None:
    before = fingerprints(whole)
    with pytest.raises(ConfigError, match="whole harvest"):
        harvester.run(PROMPTS, whole, resume=True, **RUN)
    with pytest.raises(SteerserveError, match="empty folder"):
        harvester.run(PROMPTS, whole, **RUN)
    assert fingerprints(whole) == before


def test_what_is_written_does_not_depend_on_how_sequences_are_batched(
    harvester: Harvester, whole: Path, tmp_path: Path
) -> None:
    harvester.run(PROMPTS, tmp_path, batch=3, rows_per_shard=10_000)
    for layer in LAYERS:
        found, wanted = (read(folder / f"resid_post.{layer}") for folder in (tmp_path, whole))
        for one, other in zip(found[1:], wanted[1:], strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(found.activations, wanted.activations, rtol=1e-4, atol=1e-4)


def test_a_text_longer_than_the_model_takes_is_cut_and_no_word_is_lost(
    harvester: Harvester, tmp_path: Path
) -> None:
    words = [3 + i % 300 for i in range(300)]
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in words) + "\n\nw5 w6\n")
    reports: list[Report] = []
    corpus = open_corpus(tmp_path / "a.txt")
    harvester.run(corpus, tmp_path / "out", report=reports.append)
    rows = read(tmp_path / "out" / "resid_post.1")
    assert rows.tokens.tolist() == [*words, 5, 6]
    room = LONGEST - 1
    assert rows.sequence.bincount().tolist() == [room, room, 300 - 2 * room, 2]
    assert reports[-1].read == corpus.size


def test_a_bad_line_is_named_and_what_came_before_it_is_kept(harvester: Harvester, tmp_path: Path) -> None:
    lines = [f'{{"text": "{" ".join(f"w{token}" for token in prompt[1:])}"}}' for prompt in PROMPTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"txt": "w9"}']))
    with pytest.raises(ConfigError, match="line 41"):
        harvester.run(open_corpus(tmp_path / "a.jsonl"), tmp_path / "out", **RUN)
    reader = ShardReader(tmp_path / "out" / "resid_post.0")
    assert not reader.complete
    expected = [token for prompt in PROMPTS for token in prompt[1:]]
    assert reader[:].tokens.tolist() == expected[: len(reader)]
    assert len(reader) >= sum(len(prompt) - 1 for prompt in PROMPTS[:32]) // 400 * 400


def test_a_full_disk_is_said_and_whole_shards_stay(harvester: Harvester, tmp_path: Path) -> None:
    shards = tmp_path / "resid_post.1"
    shards.mkdir()
    # The device on which every write finds no space.
    (shards / ".shard-00002.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(SteerserveError, match=r"No space left on device.* 800 of whole shards"):
        harvester.run(PROMPTS, tmp_path, **RUN)
    assert len(ShardReader(shards)) == 800
    harvester.run(PROMPTS, tmp_path, resume=True, **RUN)
    assert ShardReader(shards).complete


def test_two_harvests_never_write_to_one_folder(
    harvester: Harvester, whole: Path, tmp_path: Path, models: Callable[[str], Path]
) -> None:
    def meanwhile() -> Iterator[list[int]]:
        yield from PROMPTS[:20]
        command = [sys.executable, "-c", LOCKED, str(tmp_path / "resid_post.0")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "no other harvest" in done.stderr
        yield from PROMPTS[20:]

    harvester.run(meanwhile(), tmp_path, **RUN)
    assert fingerprints(tmp_path) == fingerprints(whole)


LOCKED = """
import sys
from steerserve.training.shard_writer import ShardWriter
ShardWriter(sys.argv[1], 64, "resid_post.0", "another", resume=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_harvest_killed_hard_goes_on_to_the_files_of_one_that_never_was(
    hollow: Callable[[str], Path], harvester: Harvester, tmp_path: Path
) -> None:
    prompts = random_prompts(1500, [5, 40, 110], seed=52)
    lines = [" ".join(f"w{token}" for token in prompt[1:]) for prompt in prompts]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    corpus, killed, never = open_corpus(tmp_path / "a.txt"), tmp_path / "killed", tmp_path / "never"
    with start_command(hollow("llama"), tmp_path / "a.txt", killed) as command:
        while not (killed / "resid_post.1" / "shard-00004.safetensors").exists():
            assert command.poll() is None
            time.sleep(0.02)
        # The command alone: its engine is other processes, which must not go on without it.
        command.kill()
    cut = ShardReader(killed / "resid_post.1")
    assert (cut.complete, 4000 < len(cut) < sum(map(len, prompts)) - len(prompts)) == (False, True)
    stored = {name: value for name, value in fingerprints(killed).items() if "/shard" in name}
    _when_free(lambda: harvester.run(corpus, killed, rows_per_shard=1000, resume=True))
    assert stored.items() <= fingerprints(killed).items()
    harvester.run(corpus, never, rows_per_shard=1000)
    assert fingerprints(killed) == fingerprints(never)


def _when_free(harvest: Callable[[], object]) -> None:
    """Harvest once the processes that were left over are gone."""
    for _ in range(300):
        try:
            harvest()
        except SteerserveError as error:
            if "no other harvest" not in str(error):
                raise
            time.sleep(0.1)
        else:
            return
    raise AssertionError("a killed harvest still holds its folder")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "family_and_more",
    [
        ("gpt2", {}),
        # Through Transformers, whose layers return one tensor with a batch dimension.
        ("olmo2", {}),
        ("llama", {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}),
        ("llama", {"tensor_parallel_size": 2}),
        ("llama", {"runner": "v2"}),
    ],
    ids=["one tensor", "transformers", "compiled", "TP = 2", "V2 runner"],
)
def test_the_pass_ends_at_the_hooked_layer_in_every_kind_of_engine(
    family_and_more: tuple[str, dict[str, Any]],
    hollow: Callable[[str], Path],
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, more = family_and_more[0], dict(family_and_more[1])
    if "tensor_parallel_size" in more:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if more.pop("runner", "v1") == "v2":
        interpret(monkeypatch)
    prompts = PROMPTS[:12]
    with start(hollow(family), HarvestPoints(layer=1), **more) as harvester:
        assert harvester.run(prompts, tmp_path) == sum(len(prompt) - 1 for prompt in prompts)
    check_against_transformers(models(family), prompts, 1, read(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_embeddings_are_harvested_and_streamed_without_running_any_layer(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    points = HarvestPoints(layer=0, hook="resid_pre")
    with start(models("llama"), points) as harvester:
        harvester.run(PROMPTS, tmp_path / "out")
        endless = (prompt for _ in range(1000) for prompt in PROMPTS)
        with stream(harvester, endless, 500, ahead=100, folder=tmp_path) as source:
            batches = list(source.shuffled_batches(32, 0, 1))
        # The engine is free again, and the folder of the stream is gone.
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        harvester.run(PROMPTS[:2], tmp_path / "more")
    rows = read(tmp_path / "out")
    table = load_file(models("llama") / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.equal(rows.activations, table[rows.tokens.long()])
    assert len(batches) == 500 // 32
    harvested = {row.numpy().tobytes() for row in rows.activations[:500]}
    assert {row.numpy().tobytes() for batch in batches for row in batch} <= harvested


@pytest.mark.parametrize(
    ("layer", "more", "error", "says"),
    [
        (N_LAYERS, {}, ConfigError, "`layer` < 4"),
        (1, {"data_parallel_size": 2}, ConfigError, "starts one for each replica"),
        (1, {"enable_prefix_caching": True}, ConfigError, "prefix caching"),
        (1, {"additional_config": {"steerserve": {}}}, ConfigError, "additional config"),
        (
            1,
            {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
            (ConfigError, IncompatibleError),
            "one engine|replicas",
        ),
    ],
)
def test_what_cannot_be_harvested_is_refused_before_an_engine_starts(
    layer: int,
    more: dict[str, Any],
    error: type[Exception],
    says: str,
    models: Callable[[str], Path],
) -> None:
    with pytest.raises(error, match=says):
        Harvester(str(models("llama")), HarvestPoints(layer=layer), **(ENGINE | more))
