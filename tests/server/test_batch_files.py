"""`vllm run-batch`: a line that asks for steering is steered or has an error of its own; none is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server import conftest as plain
from tests.support import fork_server
from tests.support.misplaced import BODIES, lines
from tests.support.models import make_model
from tests.support.one import OneAtATime
from tests.support.times import starting

STRONG: dict[str, Any] = {
    "interventions": [{"sae": "demo", "feature": n, "op": "clamp", "value": 30.0} for n in range(4)]
}
URL = "/v1/chat/completions"
BODY = {"model": "tiny", **BODIES[URL], "max_tokens": 8}
STEERED = {**BODY, "vllm_xargs": {"steering": json.dumps(STRONG)}}
BEAMS = {"use_beam_search": True, "n": 2}
OWN: dict[str, dict[str, Any]] = {
    "plain": BODY,
    "steered": STEERED,
    "beams": {**BODY, **BEAMS},
    "steered beams": {**STEERED, **BEAMS},
    "garbage": {**BODY, "vllm_xargs": {"steering": "garbage"}},
    "garbage beams": {**BODY, **BEAMS, "vllm_xargs": {"steering": "garbage"}},
    "words": {**BODY, "messages": [{"role": "user", "content": json.dumps(STRONG)}]},
}


@pytest.fixture(autouse=True)
def _log_on_failure() -> None:
    """Instead of the folder's fixture of this name, which would start the folder's server too."""


@pytest.fixture(scope="module")
def replies(running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a batch file of all lines comes to, by their ids."""
    # Its engine is one too, and what is set for the one that ran is not set for it.
    running.stop()
    folder = tmp_path_factory.mktemp("batch")
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    own = [json.dumps({"custom_id": n, "method": "POST", "url": URL, "body": b}) for n, b in OWN.items()]
    source.write_text("\n".join([*own, *(line for _, line in lines(STRONG))]), encoding="utf-8")
    with starting():
        done = fork_server.run(
            *_command(folder, source, out), env=plain.environment(), folder=folder, timeout=400
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {line["custom_id"]: line for line in found}


def _command(folder: Path, source: Path, out: Path) -> list[str]:
    sae = str(plain.labelled_sae(folder / "sae"))
    config = {"steerserve": {"saes": [{"name": "demo", "path": sae}]}}
    flags = {
        "input-file": str(source),
        "output-file": str(out),
        "model": str(make_model(folder / "model", "llama", never_special=True)),
        "served-model-name": "tiny",
        "dtype": "float32",
        "max-model-len": "512",
        "additional-config": json.dumps(config),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return ["-m", "steerserve_vllm.vllm_command", "run-batch", *words, "--enforce-eager"]


def text(line: dict[str, Any]) -> str:
    said: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return said


def test_every_line_that_asks_in_a_wrong_way_has_an_error_of_its_own(
    replies: dict[str, dict[str, Any]],
) -> None:
    asked = dict(lines(STRONG))
    assert len(asked) > 1000
    ignored = [said for said in asked if replies[said]["error"] is None]
    assert ignored == ["`steering` as text in vllm_xargs"]
    assert all(replies[said]["response"]["status_code"] == 400 for said in asked if said not in ignored)


def test_steering_in_vllm_xargs_is_honoured(replies: dict[str, dict[str, Any]]) -> None:
    assert text(replies["steered"]) != text(replies["plain"])
    assert replies["words"]["error"] is None
    body = replies["steered"]["response"]["body"]
    entries = body["steering"]["interventions"]
    assert [entry["after"]["mean"] for entry in entries] == [30.0] * 4
    # The last token is not read; `<bos>` and the template's `w1`, which no word is, are special.
    assert {entry["tokens"] for entry in entries} == {body["usage"]["total_tokens"] - 3}
    assert "steering" not in replies["plain"]["response"]["body"]


@pytest.mark.parametrize("said", ["steered beams", "garbage", "garbage beams"])
def test_what_beams_would_drop_is_refused(replies: dict[str, dict[str, Any]], said: str) -> None:
    assert replies["beams"]["error"] is None
    assert "steering" in json.dumps(replies[said]["error"])
    assert replies[said]["response"]["status_code"] == 400
