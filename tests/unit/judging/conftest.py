"""Small random models and SAEs, and labelled texts of the demo's grammar."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.corpus.documents import labelled_documents
from steerserve.judging.hooked import HookedModel, load_model
from steerserve.judging.judged import Judged, open_judged
from steerserve.judging.texts import Text
from steerserve.sae import Hook
from tests.support.models import make_model
from tests.support.saes import make_sae

DEMO = Path(__file__).parents[3] / "sae_weights" / "demo"
LAYER = 1
WORDS = ["w5 w9 w30 w8 w77 w101 w12", "w200 w3 w44", "w17 w18 w19 w20 w250 w9 w9 w31 w60 w61"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", never_special=True)


@pytest.fixture(scope="session")
def model(llama: Path) -> HookedModel:
    return load_model(str(llama), Hook(LAYER, "resid_post"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAEs saved by SAELens, by kind; the layer norm's decoder depends on the token."""
    root = tmp_path_factory.mktemp("saes")
    settings = {"normalize_activations": "layer_norm"}
    found = {name: make_sae(root / name, name, LAYER, seed=1) for name in ("jumprelu", "topk", "standard")}
    return found | {"layer_norm": make_sae(root / "layer_norm", "standard", LAYER, seed=3, **settings)}


@pytest.fixture(scope="session")
def saes(folders: dict[str, Path]) -> dict[str, Judged]:
    return {name: open_judged(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def labelled() -> list[Text]:
    """Sixteen texts, of four sentences each, of each of four domains."""
    sentences: dict[str, list[str]] = {name: [] for name in ("food", "music", "code", "legal")}
    for document in labelled_documents(7_000_003, 400):
        for start, end, domain in document.spans:
            if domain in sentences:
                sentences[domain].append(document.text[start:end].strip())
    return [
        (" ".join(own[at : at + 4]), domain) for domain, own in sentences.items() for at in range(0, 64, 4)
    ]


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randn(60, 64, generator=torch.Generator().manual_seed(1)) * 2
