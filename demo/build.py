"""Rebuild everything under sae_weights/demo from a fixed seed: model, harvest, SAE, cards, measured table.

python -m demo.build              everything
python -m demo.build --from sae   keeps the model and the harvest of an earlier run
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from demo.cards import make_cards
from demo.corpus.documents import labelled_documents, tokenise
from demo.evaluate import write_results
from demo.steer import prepare_environment
from demo.zoo import LAYER, LAYERS, build_zoo
from steerserve.config import HarvestConfig
from steerserve.training.command import train_folder
from steerserve.training.settings import parse_settings

DOCUMENTS = 2500
# The harvest's documents are not the model's: a feature should be found in text that was not learnt by heart.
DOCUMENTS_SEED = 3_000_003
HELD_OUT = 65_536
SETTINGS = parse_settings(
    {"d_sae": 2048, "k": 31, "tokens": 16_000_000, "batch_size": 2048, "lr": 2e-3, "held_out": HELD_OUT}
)


@dataclass(frozen=True)
class Places:
    """Where everything goes: `out` is kept, `work` is not."""

    out: Path
    work: Path

    @property
    def model(self) -> Path:
        """The language model in Hugging Face's layout."""
        return self.out / "model"

    @property
    def sae(self) -> Path:
        """The SAE with its manifest."""
        return self.out / "sae"

    @property
    def zoo(self) -> Path:
        """SAEs of other architectures and layers."""
        return self.out / "zoo"

    @property
    def harvest(self) -> HarvestConfig:
        """The stream of every layer, a folder each."""
        return HarvestConfig(layer=(LAYER, *LAYERS), out=(self.work / "shards").absolute())

    @property
    def shards(self) -> Path:
        """The harvested activations of the demo's layer."""
        return self.harvest.folders[LAYER]


def build_model(places: Places, seed: int) -> None:
    """Train tokenizer and model on the generated corpus."""
    command = [sys.executable, "-m", "demo.model", "--out", str(places.model), "--seed", str(seed)]
    subprocess.run(command, check=True)


def build_harvest(places: Places, seed: int) -> None:
    """Keep the residual stream of the corpus, captured through vLLM and this plugin."""
    from steerserve_vllm.harvest import harvest

    tokenizer = AutoTokenizer.from_pretrained(places.model)
    documents = labelled_documents(DOCUMENTS_SEED + seed, DOCUMENTS)
    prompts = (tokenise(document, tokenizer)[0] for document in documents)
    shutil.rmtree(places.harvest.out, ignore_errors=True)
    harvest(
        str(places.model),
        prompts,
        places.harvest,
        total=DOCUMENTS,
        max_model_len=2048,
        max_num_seqs=64,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
    )


def build_sae(places: Places, seed: int) -> None:
    """Train the SAE on the harvest."""
    fresh = places.work / "sae"
    shutil.rmtree(fresh, ignore_errors=True)
    train_folder(places.shards, fresh, SETTINGS.model_copy(update={"seed": seed}))
    shutil.rmtree(places.sae, ignore_errors=True)
    fresh.rename(places.sae)


def build_others(places: Places, seed: int) -> None:
    """Train the zoo: other architectures, and other layers."""
    build_zoo(places.harvest.folders, LAYER, places.zoo, places.work / "zoo", seed)


def build_cards(places: Places, seed: int) -> None:
    """Find each domain's features and the strengths that work, by measuring."""
    make_cards(places.out, places.shards, DOCUMENTS_SEED + seed, HELD_OUT)


def build_table(places: Places, seed: int) -> None:
    """Measure what the cards promise on fresh samples and write the table."""
    write_results(places.out)


STAGES: dict[str, Callable[[Places, int], None]] = {
    "model": build_model,
    "harvest": build_harvest,
    "sae": build_sae,
    "zoo": build_others,
    "cards": build_cards,
    "table": build_table,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="first", choices=STAGES, default="model", help="first stage to run (default model)"
    )
    parser.add_argument("--to", dest="last", choices=STAGES, default="table", help="last stage to run")
    parser.add_argument("--out", type=Path, default=Path("sae_weights/demo"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder of intermediate files")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    given = parser.parse_args()
    names = list(STAGES)
    console = Console()
    places = Places(given.out, given.work)
    places.work.mkdir(parents=True, exist_ok=True)
    prepare_environment()
    for name in names[names.index(given.first) : names.index(given.last) + 1]:
        console.rule(f"{name}: {STAGES[name].__doc__}")
        began = time.monotonic()
        STAGES[name](places, given.seed)
        console.print(f"{name}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
