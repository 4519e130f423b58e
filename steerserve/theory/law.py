"""How the loss of a sparse autoencoder falls with L0, width and tokens, and what that says to train next.

    L(k, n, t) =  exp(α + β_k·log k + β_n·log n + γ·log k·log n)
                + exp(ζ + η·log k)
                + exp(δ + θ·log t + φ·log n)

k: active features, n: width, t: tokens. The first two terms are those of SAEs that are trained to the end;
the third is what too few tokens cost, which is more for a wider SAE.

Source: Gao et al. 2024, arXiv:2406.04093, §3.1, for the first two terms; that the third is added, as Hoffmann
et al. 2022, arXiv:2203.15556, §3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerserve.errors import ConfigError

__all__ = ["NAMES", "Law", "Point", "fit_law"]

Floats = NDArray[np.float64]

NAMES = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta", "delta", "theta", "phi")
# Widths of the region that parameters are looked for in: wide, but no term may overflow.
_BOUND = 30.0
_STARTS = 16


@dataclass(frozen=True)
class Point:
    """One trained SAE. Attributes: k, width, tokens: what was set. loss: on held-out data, above 0."""

    k: float
    width: float
    tokens: float
    loss: float = float("nan")


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        parameters: [9], in the order of NAMES.
        error: the root mean square of log(loss) − log(predicted) over the points of the fit.
    """

    parameters: Floats
    error: float

    def predict(self, k: Any, width: Any, tokens: Any) -> Floats:
        """The loss. Args: numbers or arrays of shapes that go together."""
        total: Floats = self.terms(k, width, tokens).sum(0)
        return total

    def terms(self, k: Any, width: Any, tokens: Any) -> Floats:
        """The three terms one by one, [3, ...]."""
        return np.exp(_log_terms(self.parameters, *_logs(k, width, tokens)))

    def numbers(self) -> dict[str, float]:
        """The parameters by name, and the error."""
        return {**dict(zip(NAMES, self.parameters.tolist(), strict=True)), "rms_log_error": self.error}


def fit_law(points: Sequence[Point], seed: int = 0) -> Law:
    """Least squares on log(loss), from several starts; the best one counts.

    Raises: ConfigError if there are fewer points than parameters, or a loss is not above 0.
    """
    from scipy.optimize import least_squares

    if len(points) <= len(NAMES):
        raise ConfigError(
            f"expected more than {len(NAMES)} runs to fit {len(NAMES)} numbers, got {len(points)}"
        )
    columns = np.array([[p.k, p.width, p.tokens, p.loss] for p in points], dtype=np.float64).T
    if not (np.isfinite(columns).all() and (columns > 0).all()):
        raise ConfigError("expected runs with k, width, tokens and loss above 0 and finite")
    logs, wanted = np.log(columns[:3]), np.log(columns[3])

    def residuals(parameters: Floats) -> Floats:
        off: Floats = np.logaddexp.reduce(_log_terms(parameters, *logs), axis=0) - wanted
        return off

    def slopes(parameters: Floats) -> Floats:
        return _slopes(parameters, *logs)

    limits = {"bounds": (-_BOUND, _BOUND), "ftol": 1e-13, "xtol": 1e-13, "gtol": 1e-13, "max_nfev": 3000}
    found = [
        least_squares(residuals, start, slopes, x_scale="jac", **limits)
        for start in _starts(logs, wanted, np.random.default_rng(seed))
    ]
    best = min(found, key=lambda one: float(one.cost))
    return Law(best.x, float(np.sqrt(2 * best.cost / len(points))))


def _logs(*values: Any) -> list[Floats]:
    return [np.log(np.asarray(value, dtype=np.float64)) for value in values]


def _log_terms(parameters: Floats, k: Floats, n: Floats, t: Floats) -> Floats:
    """The logarithms of the three terms, [3, ...]. Args: k, n, t: logarithms."""
    alpha, beta_k, beta_n, gamma, zeta, eta, delta, theta, phi = parameters
    k, n, t = np.broadcast_arrays(k, n, t)
    return np.stack(
        [alpha + beta_k * k + beta_n * n + gamma * k * n, zeta + eta * k, delta + theta * t + phi * n]
    )


def _slopes(parameters: Floats, k: Floats, n: Floats, t: Floats) -> Floats:
    """d log L / d parameters, [points, 9]: its share of the loss times its own slope, term by term."""
    terms = _log_terms(parameters, k, n, t)
    first, second, third = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
    columns = (first, first * k, first * n, first * k * n, second, second * k, third, third * t, third * n)
    return np.stack(columns, axis=1)


def _starts(logs: Floats, wanted: Floats, generator: np.random.Generator) -> list[Floats]:
    """Exponents with the signs of the literature, and terms that each give a share of the loss."""
    k, n, t = logs.mean(1)
    found = []
    for _ in range(_STARTS):
        beta_k, beta_n, gamma = -generator.uniform(0, 1, 3) * (1, 1, 0.1)
        eta, theta, phi = generator.uniform(-1, 0), generator.uniform(-1.5, -0.1), generator.uniform(0, 1)
        shares = np.log(generator.dirichlet((1, 1, 1))).clip(-6) + wanted.mean()
        alpha = shares[0] - beta_k * k - beta_n * n - gamma * k * n
        zeta, delta = shares[1] - eta * k, shares[2] - theta * t - phi * n
        start = np.array([alpha, beta_k, beta_n, gamma, zeta, eta, delta, theta, phi])
        found.append(start.clip(-_BOUND + 1e-3, _BOUND - 1e-3))
    return found
