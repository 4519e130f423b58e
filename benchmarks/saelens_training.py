"""SAELens' own training loop on batches that are given to it, and what it trained as an autoencoder."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Theirs", "train_saelens"]

_NAMES = {"matryoshka": "matryoshka_batchtopk"}
_SAVED_AS_ANOTHER = ("batchtopk", "matryoshka")


@dataclass(frozen=True)
class Theirs:
    """A SAE of SAELens, as it is served: batchtopk and matryoshka saved and loaded, as jumprelu."""

    sae: Any

    @property
    def d_in(self) -> int:
        return int(self.sae.cfg.d_in)

    @property
    def d_sae(self) -> int:
        return int(self.sae.cfg.d_sae)

    @property
    def decoder(self) -> Tensor:
        found: Tensor = self.sae.W_dec.detach()
        return found

    @torch.no_grad()
    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f: Tensor = self.sae.encode(x)
        return f, self.sae.decode(f)


def train_saelens(
    architecture: str,
    batches: Iterable[Tensor],
    *,
    d_in: int,
    d_sae: int,
    steps: int,
    batch: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Theirs:
    """Train by `sae_lens.training.sae_trainer.SAETrainer.fit`, with the trainer settings of `train_toy_sae`.

    Args: settings: `lr` and `dead_feature_window` (steps) of the trainer, all others of the SAE's config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        own = dict(settings)
        lr, window = own.pop("lr"), own.pop("dead_feature_window", 1000)
        decay = own.pop("lr_decay_steps", 0)
        torch.manual_seed(seed)
        kind, config = get_sae_training_class(_NAMES.get(architecture, architecture))
        sae = kind(config(d_in=d_in, d_sae=d_sae, normalize_activations="expected_average_only_in", **own))
        trainer = SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=steps * batch,
            device="cpu",
            autocast=False,
            lr=lr,
            lr_end=lr,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            lr_decay_steps=decay,
            adam_beta1=0.9,
            adam_beta2=0.999,
            n_restart_cycles=1,
            train_batch_size_samples=batch,
            dead_feature_window=window,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
            n_batches_for_norm_estimate=32,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            SAETrainer(cfg=trainer, sae=sae, data_provider=_endless(batches)).fit()
        sae.eval()
        if architecture not in _SAVED_AS_ANOTHER:
            return Theirs(sae)
        with tempfile.TemporaryDirectory(prefix="steerserve-recovery-") as folder:
            sae.save_inference_model(folder)
            return Theirs(SAE.load_from_disk(folder))


def _endless(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """An iterator, which is what their trainer takes."""
    yield from batches
