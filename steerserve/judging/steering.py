"""Steering by an SAE's features against what it has to beat: a prompt, chance, its own sign, and directions.

For each concept every method is tried at several strengths on one half of the prompts; what scored best there
is measured on the other half, which chose nothing. Published as found, whoever wins.

| method | what it does |
|---|---|
| unsteered | nothing: the floor for the concept, the ceiling for the other axes |
| prompt | puts a text of the concept before the prompt; the model is left alone |
| sae | adds a feature's decoder row; the feature is one of the best detectors of the concept |
| random feature | adds another live feature's row, with the same freedom of strength |
| wrong sign | subtracts what `sae` adds |
| diffmean, probe | adds the direction that supervised methods find in the same texts |

Source: Wu et al. 2025, arXiv:2501.17148 (AxBench), for the procedure; see `axes.py` for the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from steerserve.errors import ConfigError

from .axes import Axes, Baseline, Reading, mean_axes, read, score
from .classifier import ConceptJudge
from .generation import Request, continuations
from .hooked import HookedModel
from .outcomes import SAE, WRONG, Candidate, Outcome, Steering, SteeringSettings

__all__ = ["judge_steering"]


@dataclass(frozen=True, eq=False)
class _Trial:
    label: str
    candidate: Candidate
    strength: float


def judge_steering(
    model: HookedModel,
    prompts: Sequence[str],
    candidates: Mapping[str, Sequence[Candidate]],
    examples: Mapping[str, str],
    judge: ConceptJudge,
    settings: SteeringSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Steering:
    """Try, choose and measure.

    Args:
        prompts: two at least; every second one chooses, the rest measure.
        candidates: label → what is tried for it. examples: label → the text that the prompt method shows.
        judge: how much of a concept a text holds.
        progress: told how many continuations are done, of how many in this stage.
    Raises: ConfigError if there are fewer than two prompts.
    """
    settings = settings or SteeringSettings()
    if len(prompts) < 2:
        raise ConfigError(f"expected at least two prompts to steer, got {len(prompts)}")
    run = _Run(model, judge, settings, progress)
    chosen, trials = run.choose(prompts[0::2], candidates)
    outcomes = run.measure(prompts[1::2], chosen, examples)
    return Steering(outcomes, trials, run.baseline, len(prompts[1::2]))


class _Run:
    """The state of one judgement: the model, the judge, and what unsteered text is like."""

    def __init__(
        self,
        model: HookedModel,
        judge: ConceptJudge,
        settings: SteeringSettings,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._model, self._judge, self._settings, self._progress = model, judge, settings, progress
        self.baseline = Baseline(0.0, 0.0, 1.0)

    def choose(
        self, prompts: Sequence[str], candidates: Mapping[str, Sequence[Candidate]]
    ) -> tuple[list[_Trial], dict[tuple[str, float], Axes]]:
        """The best trial of each concept and method, and the mean axes of each method and strength."""
        trials = [
            _Trial(label, candidate, strength)
            for label, own in candidates.items()
            for candidate in own
            for strength in self._settings.strengths
        ]
        rows = [self._ids(prompt) for prompt in prompts]
        readings = self._read([(row, row, None) for row in rows] + self._asked(rows, trials))
        self.baseline = Baseline.of(readings[: len(rows)])
        found = self._score(readings[len(rows) :], [trial.label for trial in trials], len(rows))
        return _best(trials, found), _by_strength(trials, found)

    def measure(
        self, prompts: Sequence[str], chosen: Sequence[_Trial], examples: Mapping[str, str]
    ) -> list[Outcome]:
        """The chosen trials, their wrong signs, the prompt control and no steering, on other prompts."""
        labels = list(dict.fromkeys(trial.label for trial in chosen))
        turned = [
            _Trial(
                trial.label, Candidate(WRONG, -trial.candidate.unit, trial.candidate.feature), trial.strength
            )
            for trial in chosen
            if trial.candidate.method == SAE
        ]
        trials = [*chosen, *turned]
        rows = [self._ids(prompt) for prompt in prompts]
        plain: list[_Asked] = [(row, row, None) for row in rows]
        shown: list[_Asked] = [
            (row, self._ids(f"{examples[label].strip()} {prompt}"), None)
            for label in labels
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        readings = self._read([*plain, *shown, *self._asked(rows, trials)])
        count = len(rows)
        # The unsteered texts are the same for every concept, but each concept's judge reads them.
        groups = readings[:count] * len(labels) + readings[count:]
        owners = [*labels, *labels, *(trial.label for trial in trials)]
        names = ["unsteered"] * len(labels) + ["prompt"] * len(labels)
        names += [trial.candidate.method for trial in trials]
        details = [(None, None)] * 2 * len(labels) + [(t.strength, t.candidate.feature) for t in trials]
        axes = self._score(groups, owners, count)
        return [
            Outcome(label, name, strength, feature, one, (prompts[0], groups[at * count].text))
            for at, (label, name, (strength, feature), one) in enumerate(
                zip(owners, names, details, axes, strict=True)
            )
        ]

    def _ids(self, text: str) -> list[int]:
        ids = self._model.encode(text, 2**20)
        # Some tokenizers end every text with a mark of its end, behind which nothing would follow.
        while len(ids) > 1 and ids[-1] in self._model.special:
            ids.pop()
        return ids

    def _asked(self, rows: Sequence[list[int]], trials: Sequence[_Trial]) -> list[_Asked]:
        return [(row, row, trial.strength * trial.candidate.unit) for trial in trials for row in rows]

    def _read(self, asked: Sequence[_Asked]) -> list[Reading]:
        done = 0

        def count(requests: int) -> None:
            nonlocal done
            done += requests
            if self._progress is not None:
                self._progress(done, len(asked))

        settings = self._settings
        texts = continuations(
            self._model,
            [Request(context, vector) for _, context, vector in asked],
            tokens=settings.tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            progress=count,
        )
        return read(self._model, [prompt for prompt, _, _ in asked], texts)

    def _score(self, readings: Sequence[Reading], labels: Sequence[str], size: int) -> list[Axes]:
        """Mean axes of each run of `size` readings. Args: labels: of the runs."""
        return [
            mean_axes(score(readings[at * size : (at + 1) * size], self.baseline, self._judge, label))
            for at, label in enumerate(labels)
        ]


# The prompt by which a continuation is judged, the one it is asked for with, and what is added.
_Asked = tuple[list[int], list[int], Tensor | None]


def _turned(trial: _Trial) -> _Trial:
    candidate = Candidate(WRONG, -trial.candidate.unit, trial.candidate.feature)
    return _Trial(trial.label, candidate, trial.strength)


def _best(trials: Sequence[_Trial], found: Sequence[Axes]) -> list[_Trial]:
    """The trial with the highest overall score of each concept and method; concepts in their order."""
    best: dict[tuple[str, str], int] = {}
    for at, trial in enumerate(trials):
        key = (trial.label, trial.candidate.method)
        if key not in best or found[at].overall > found[best[key]].overall:
            best[key] = at
    return [trials[at] for at in best.values()]


def _by_strength(trials: Sequence[_Trial], found: Sequence[Axes]) -> dict[tuple[str, float], Axes]:
    best: dict[tuple[str, float, str], Axes] = {}
    for trial, axes in zip(trials, found, strict=True):
        key = (trial.candidate.method, trial.strength, trial.label)
        if key not in best or axes.overall > best[key].overall:
            best[key] = axes
    groups: dict[tuple[str, float], list[Axes]] = {}
    for (method, strength, _), axes in best.items():
        groups.setdefault((method, strength), []).append(axes)
    return {key: mean_axes(group) for key, group in groups.items()}
