from __future__ import annotations

import itertools

import numpy as np
import pytest

from steerserve.errors import ConfigError
from steerserve.theory.law import NAMES, Law, Point, fit_law
from steerserve.theory.next_run import flops, propose

# β_n and γ as Gao et al. found them for GPT-4, roughly; the rest is made up.
PLANTED = np.array([0.5, -0.25, -0.12, -0.015, -2.0, -0.4, 5.0, -0.6, 0.25])
WIDTHS, KS, TOKENS = (256, 1024, 4096, 16384), (8, 16, 32, 64), (1e5, 1e6, 1e7)


def planted_points(noise: float = 0.0) -> list[Point]:
    law, generator = Law(PLANTED, 0.0), np.random.default_rng(0)
    return [
        Point(k, n, t, float(law.predict(k, n, t)) * float(np.exp(noise * generator.standard_normal())))
        for n, k, t in itertools.product(WIDTHS, KS, TOKENS)
    ]


def test_the_law_is_the_sum_of_three_powers() -> None:
    a, b_k, b_n, g, z, e, d, th, ph = PLANTED
    k, n, t = 16.0, 1024.0, 1e6
    wanted = np.exp(a) * k**b_k * n**b_n * k ** (g * np.log(n))
    wanted += np.exp(z) * k**e + np.exp(d) * t**th * n**ph
    assert float(Law(PLANTED, 0.0).predict(k, n, t)) == pytest.approx(wanted)


def test_the_fit_recovers_planted_exponents() -> None:
    law = fit_law(planted_points())
    assert law.error < 1e-4
    for name, found, wanted in zip(NAMES, law.parameters, PLANTED, strict=True):
        assert found == pytest.approx(wanted, abs=0.05), name


def test_the_fit_predicts_runs_that_it_did_not_see_and_that_cost_more() -> None:
    points = planted_points(noise=0.01)
    seen = [p for p in points if p.tokens < 1e7 or p.width < 16384]
    law = fit_law(seen)
    assert law.error == pytest.approx(0.01, rel=0.3)
    for p in points:
        assert float(law.predict(p.k, p.width, p.tokens)) == pytest.approx(p.loss, rel=0.06)


def test_too_few_runs_and_losses_that_are_not_positive_are_refused() -> None:
    points = planted_points()
    with pytest.raises(ConfigError, match="expected more than 9 runs to fit 9 numbers, got 9"):
        fit_law(points[:9])
    with pytest.raises(ConfigError, match="above 0 and finite"):
        fit_law([*points[:12], Point(8, 256, 1e5, 0.0)])


def test_the_next_run_is_the_best_within_the_budget_found_by_trying_all() -> None:
    points, law, d = planted_points(), Law(PLANTED, 0.0), 128
    dearest = max(flops(p.k, p.width, p.tokens, d) for p in points)
    for one in propose(law, points, d, budget=4.0):
        assert one.flops <= 4.0 * dearest * 1.001
        assert one.loss == pytest.approx(float(law.predict(one.k, one.width, one.tokens)), rel=1e-3)
        widths = np.geomspace(256, 8 * 16384, 400)
        tokens = np.minimum(4.0 * dearest / flops(one.k, widths, 1.0, d), 8e7)
        assert one.loss <= float(law.predict(one.k, widths, tokens).min()) * 1.01
        assert one.loss < one.best_loss


def test_with_nothing_to_gain_from_width_the_next_run_is_narrow() -> None:
    flat = PLANTED.copy()
    flat[[2, 3]] = 0.0
    proposals = propose(Law(flat, 0.0), planted_points(), 128)
    assert {one.width for one in proposals} == {256}
