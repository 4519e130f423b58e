"""What harvesting writes is the stream that Hugging Face computes, token by token, and that is steered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steerserve.config import HarvestConfig
from steerserve.errors import ConfigError
from steerserve.training.corpus import read_texts
from steerserve.training.shards import ShardReader
from steerserve_vllm.harvest import harvest
from tests.support.engine import random_prompts
from tests.support.models import BOS


def test_every_ordinary_token_of_every_prompt_is_written_once(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = random_prompts(20, [5, 40, 110], seed=51)
    config = HarvestConfig(layer=2, out=tmp_path / "shards")
    written = harvest(
        str(models("llama")), prompts, config, batch=8, dtype="float32", enforce_eager=True,
        max_model_len=256, max_num_seqs=8, max_num_batched_tokens=48, gpu_memory_utilization=0.2,
    )  # fmt: skip
    reader = ShardReader(tmp_path / "shards")
    rows = reader[0 : len(reader)]
    assert written == len(reader) == sum(len(prompt) - 1 for prompt in prompts)
    assert (reader.hook.layer, reader.hook.site) == (2, "resid_post")

    model = AutoModelForCausalLM.from_pretrained(models("llama")).float().eval()
    for index, prompt in enumerate(prompts):
        mine = rows.sequence == index
        order = rows.position[mine].argsort()
        assert rows.position[mine][order].tolist() == list(range(1, len(prompt)))
        assert rows.tokens[mine][order].tolist() == prompt[1:]
        assert prompt[0] == BOS
        with torch.no_grad():
            expected = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[3][0, 1:]
        torch.testing.assert_close(rows.activations[mine][order], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}\n', "line 2"),
        ("a.jsonl", '{"text": "one"}\nnot json\n', "line 2"),
        ("missing.txt", None, "found none"),
    ],
)
def test_a_corpus_that_is_not_what_it_should_be_is_named_by_line(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_texts(tmp_path / name)
