"""Dictionary recovery: every architecture on the same planted data, and what it found of the dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerserve.judging.dictionary import judge_dictionary
from steerserve.sae.architectures import ARCHITECTURES
from steerserve.training.evaluate import evaluate
from steerserve.training.generated import train_on
from steerserve.training.run import Progress
from steerserve.training.settings import TrainSettings, parse_settings
from steerserve.training.trainer import Trained

from .planted import PlantedData

__all__ = [
    "RECOVERED",
    "Recovered",
    "RecoverySetup",
    "judge_recovery",
    "planted_data",
    "recover",
    "settings_for",
]

# Those that are compared by default, in the order of the table of targets.
RECOVERED = ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
_HELD_OUT = 8192
_HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class RecoverySetup:
    """The planted dictionary, and how long to look for it. The defaults are those of our targets.

    Attributes:
        d_in: width d. features: planted, and latents F. active: features in a sample, on average.
        steps, batch: of training. seed: decides features, data, and where training starts.
    """

    d_in: int = 128
    features: int = 256
    active: float = 10.0
    steps: int = 3000
    batch: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Recovered:
    """What an SAE found. Attributes:
    mmcs, mcc, uniqueness: of its decoder against the planted features, see `judge_dictionary`.
    explained_variance, l0, dead_fraction: on fresh samples.
    best: [K], each planted feature's best cosine with a latent. losses: (step, loss) as it trained.
    """

    architecture: str
    mmcs: float
    mcc: float
    uniqueness: float
    explained_variance: float
    l0: float
    dead_fraction: float
    best: Tensor
    losses: list[tuple[int, float]]

    def numbers(self) -> dict[str, float | str]:
        """What goes into a table."""
        names = ("mmcs", "mcc", "uniqueness", "explained_variance", "l0", "dead_fraction")
        return {"architecture": self.architecture, **{name: getattr(self, name) for name in names}}


def planted_data(setup: RecoverySetup) -> PlantedData:
    """The data: all features equally probable."""
    density = torch.full((setup.features,), setup.active / setup.features)
    return PlantedData.random(density, setup.d_in, setup.seed)


def settings_for(
    architecture: str, setup: RecoverySetup, options: Mapping[str, Any] | None = None
) -> TrainSettings:
    """The trainer's defaults, but for what the data says: how many features a sample has, how rare they are.

    Args: options: settings that replace all of these.
    """
    known = ARCHITECTURES[architecture].Options.model_fields
    # What an L1 penalty takes from each feature is weighed against its strength, which falls as 1/√active.
    weak = setup.active**-0.5
    l1 = {"standard": 0.16, "gated": 0.8}.get(architecture, 0.0) * weak
    values: dict[str, Any] = {
        "k": round(setup.active),
        "l0_target": setup.active,
        "l1": l1,
        # AuxK counts the less the fewer are dead; of the last few of a small dictionary each one counts.
        "aux": {"batchtopk": 8.0, "matryoshka": 32.0, "topk": 32.0}.get(architecture, 1.0),
        # Planted features have no order: prefixes that must reconstruct as well as the whole merge some.
        "inner": 0.25,
    }
    return parse_settings(
        {
            "architecture": architecture,
            "d_sae": setup.features,
            "tokens": setup.steps * setup.batch,
            "batch_size": setup.batch,
            "seed": setup.seed,
            "device": "cpu",
            # Forty times as long as a planted feature is silent on average.
            "dead_after": round(40 * setup.features / setup.active),
            **{name: value for name, value in values.items() if name in known},
            **(options or {}),
        }
    )


def recover(
    architecture: str,
    setup: RecoverySetup,
    on_progress: Callable[[Progress], None] = lambda _: None,
    options: Mapping[str, Any] | None = None,
) -> Recovered:
    """Train one SAE on the planted data, and look for the planted features in its decoder."""
    data, losses = planted_data(setup), []

    def report(_: int, progress: Progress) -> None:
        losses.append((progress.done, progress.loss))
        on_progress(progress)

    settings = settings_for(architecture, setup, options)
    trained = train_on(data.batches(setup.batch, setup.seed), [settings], report)[0]
    return judge_recovery(trained, data, losses)


def judge_recovery(trained: Trained, data: PlantedData, losses: list[tuple[int, float]]) -> Recovered:
    """Compare an SAE with the planted features, and measure it on samples that it was not trained on."""
    decoder = trained.sae.parameters["decoder"]
    fresh = next(data.batches(_HELD_OUT, _HELD_OUT_SEED))
    with torch.no_grad():
        found, measured = (
            judge_dictionary(decoder, data.features),
            evaluate(trained.sae, [fresh * trained.scale]),
        )
    unit = torch.nn.functional.normalize(decoder.detach(), dim=-1)
    return Recovered(
        trained.sae.name,
        found.mmcs,
        found.mcc,
        found.uniqueness,
        measured.explained_variance,
        measured.l0,
        measured.dead_fraction,
        (data.features @ unit.T).amax(1),
        losses,
    )
