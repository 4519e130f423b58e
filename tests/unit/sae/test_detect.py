"""Every layout is told from what lies at a path, and computes what its authors say it computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae, verify_sae
from steerserve.sae.formats import recognise

from .layouts import LAYOUTS, check, goodfire, openai, qwen_scope, write_torch


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_recognised_and_computes_its_published_formula(name: str, tmp_path: Path) -> None:
    written = LAYOUTS[name](tmp_path)
    assert recognise(written.path).layout == name
    sae = check(written)
    assert sae.hook == Hook(3, "resid_post")
    assert verify_sae(written.path).d_sae == sae.d_sae


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weights_file_itself_may_be_named(name: str, tmp_path: Path) -> None:
    weights = open_sae(LAYOUTS[name](tmp_path).path).path
    assert recognise(weights).layout == name
    assert open_sae(weights).path == weights


@pytest.mark.parametrize("write", [openai, goodfire, qwen_scope])
def test_a_single_torch_file_is_found_in_its_folder(write: object, tmp_path: Path) -> None:
    assert callable(write)
    written = write(tmp_path)
    assert open_sae(written.folder).path == written.path


def test_of_several_torch_files_one_has_to_be_named(tmp_path: Path) -> None:
    written = openai(tmp_path)
    shutil.copy(written.path, written.path.with_name("4.pt"))
    with pytest.raises(CheckpointError, match=r"found 2 files: name one of them.*3\.pt"):
        open_sae(written.folder)
    assert open_sae(written.path.with_name("4.pt")).hook == Hook(4, "resid_post")


def test_tensors_that_nobody_saves_are_refused_with_their_names(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "ae.pt", {"weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=r"got \['weight'\]"):
        open_sae(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_link_out_of_the_folder_is_refused_in_every_layout(name: str, tmp_path: Path) -> None:
    weights = open_sae(LAYOUTS[name](tmp_path / "saes").path).path
    (tmp_path / "outside").mkdir()
    weights.symlink_to(weights.rename(tmp_path / "outside" / weights.name))
    with pytest.raises(CheckpointError, match="leads out"):
        open_sae(weights)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_that_is_cut_short_is_refused_in_every_layout(name: str, share: float, tmp_path: Path) -> None:
    written = LAYOUTS[name](tmp_path)
    weights = open_sae(written.path).path
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="whole") as caught:
        open_sae(written.path)
    assert caught.value.path.name == weights.name
