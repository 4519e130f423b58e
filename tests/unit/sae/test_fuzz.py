"""Whatever stands in a config or a header: an SAE opens, or a CheckpointError says why it does not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.errors import CheckpointError
from steerserve.sae import open_sae
from steerserve.sae.command import describe
from steerserve.sae.resident import Resident

from .layouts import LAYOUTS, dictionary_learning

EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(EXAMPLES, max_examples=40)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 12, 40, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["TopK", "topk", "none", "layer_norm", "blocks.3.hook_resid_post", "blocks." + "9" * 5000]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
WITH_CONFIG = sorted(set(LAYOUTS) - {"Gemma Scope", "Goodfire", "OpenAI", "Qwen-Scope"})
SAFETENSORS = ["Gemma Scope 2", "Llama Scope", "OpenMOSS", "SAELens", "sparsify"]
ARCHIVES = ["Gemma Scope", "Goodfire", "OpenAI", "Qwen-Scope", "dictionary_learning"]


def _open(path: Path) -> None:
    """All that happens to a path before a request comes: only a CheckpointError may end it."""
    try:
        sae = open_sae(path)
        describe(sae)
        sae.rows([0, sae.d_sae - 1])
        Resident.of(sae)
    except CheckpointError:
        return


@contextmanager
def _changed(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module", params=WITH_CONFIG)
def configured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    written = LAYOUTS[request.param](tmp_path_factory.mktemp("configured"))
    (config,) = written.folder.glob("*.json")
    return written.path, config


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYOUTS[request.param](tmp_path_factory.mktemp("written")).path


@MANY
@given(data=st.data())
def test_a_config_of_any_values_never_ends_in_another_error(
    configured: tuple[Path, Path], data: st.DataObject
) -> None:
    path, config = configured
    whole = json.loads(config.read_text())
    section = data.draw(
        st.sampled_from([whole, *(part for part in whole.values() if isinstance(part, dict))])
    )
    for key in data.draw(
        st.sets(st.sampled_from(sorted(section)) | st.text(max_size=5), min_size=1, max_size=3)
    ):
        section[key] = data.draw(VALUES)
    try:
        text = json.dumps(whole)
    except ValueError:  # json writes no integer beyond 4300 digits
        return
    with _changed(config, text.encode("utf-8", "surrogatepass")):
        _open(path)


@EXAMPLES
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_a_config_of_any_bytes_never_ends_in_another_error(
    configured: tuple[Path, Path], content: bytes
) -> None:
    path, config = configured
    with _changed(config, content):
        _open(path)


@MANY
@given(data=st.data())
def test_a_weights_file_with_bytes_changed_never_ends_in_another_error(
    written: Path, data: st.DataObject
) -> None:
    file = open_sae(written).path
    content = bytearray(file.read_bytes())
    # Headers stand at the beginning, the directory of an archive at the end.
    places = (
        st.integers(0, 800)
        | st.integers(len(content) - 1200, len(content) - 1)
        | st.integers(0, len(content) - 1)
    )
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[min(max(place, 0), len(content) - 1)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    with _changed(file, bytes(content)):
        _open(written)


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", ["Gemma Scope 2", "OpenMOSS", "sparsify"])
def test_a_header_of_any_shapes_and_offsets_never_ends_in_another_error(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = _once(name, tmp_path_factory)
    file = open_sae(path).path
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entry = header[data.draw(st.sampled_from(sorted(header)))]
    sizes = st.sampled_from([0, 1, 12, 40, 2**31, 2**62, 2**64]) | st.integers(-5, 2000)
    entry["shape"] = data.draw(st.just(entry.get("shape")) | st.lists(sizes, max_size=3))
    entry["data_offsets"] = data.draw(
        st.just(entry.get("data_offsets")) | st.lists(sizes, min_size=2, max_size=2)
    )
    entry["dtype"] = data.draw(
        st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "F8_E4M3", "BOOL", "X", 3])
    )
    text = json.dumps(header).encode()
    said = data.draw(st.just(len(text)) | sizes.filter(lambda size: 0 <= size < 2**64))
    with _changed(file, struct.pack("<Q", said) + text + content[8 + length :]):
        _open(path)


_WRITTEN: dict[str, Path] = {}


def _once(name: str, factory: pytest.TempPathFactory) -> Path:
    if name not in _WRITTEN:
        _WRITTEN[name] = LAYOUTS[name](factory.mktemp("once")).path
    return _WRITTEN[name]


def _nested(depth: int) -> Any:
    value: Any = {"k": 1}
    for _ in range(depth):
        value = {"ae": value}
    return value


@pytest.mark.parametrize(
    "content", [{}, {1: 2}, _nested(50), {"ae": {}}, {"ae": 3}, {"encoder.weight": None}]
)
def test_a_torch_file_of_no_tensors_never_ends_in_another_error(content: Any, tmp_path: Path) -> None:
    import torch

    write: Callable[..., None] = torch.save
    path = dictionary_learning(tmp_path).path
    write(content, path / "ae.pt")
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(path)
