"""The whole judgement of several SAEs of one language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae import Hook

from .candidates import make_candidates, typical_texts
from .classifier import train_classifier
from .dictionary import judge_dictionary
from .hooked import HookedModel, load_model
from .judged import Judged
from .labelled import Labelled, Prepared, judge_labelled, prepare
from .outcomes import Steering, SteeringSettings
from .reconstruction import judge_reconstruction
from .settings import JudgeSettings
from .splice import Spliced, judge_splice
from .steering import judge_steering
from .texts import Text, TokenTable, collect, labels_of, split
from .training_log import TRAINING_LOG, read_log
from .verdict import Judgement, Material, Verdict

__all__ = ["judge_all", "progress_bar"]

_SHARD_BATCH = 4096


def judge_all(
    saes: Sequence[Judged],
    material: Material,
    settings: JudgeSettings | None = None,
    console: Console | None = None,
) -> Judgement:
    """Judge every SAE on the same material.

    Raises: ConfigError if an SAE does not fit the model or the shards, there is nothing to judge on, or an
        SAE's hook is not known.
    """
    settings = settings or JudgeSettings()
    if not material.texts and material.shards is None:
        raise ConfigError("expected texts or activation shards to judge on, got neither")
    with progress_bar(console) as bar:
        run = _Run(material, settings, bar)
        verdicts = [run.verdict(judged) for judged in saes]
    return Judgement(material.model, settings, run.facts(), verdicts, run.classifier)


def progress_bar(console: Console | None = None) -> Progress:
    """One line for each stage, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(stderr=True))


class _Run:
    """The language model, loaded once, and the activations at the hook that is judged at."""

    def __init__(self, material: Material, settings: JudgeSettings, bar: Progress) -> None:
        self._material, self._settings, self._bar = material, settings, bar
        self._model: HookedModel | None = None
        self._tables: tuple[Hook, TokenTable | None, Prepared | None] | None = None
        self._labels = _labels(material)
        share, seed = settings.held_out, settings.seed
        self._halves = split(material.texts, share, seed)
        if not self._labels:
            self._halves = ([], self._halves[0] + self._halves[1])
        self.classifier = train_classifier(*self._halves) if self._labels else None

    def facts(self) -> dict[str, Any]:
        """What the judgement rests on, for the report."""
        shards, judge = self._material.shards, self._material.judge
        return {
            "texts": len(self._material.texts),
            "labels": list(self._labels),
            "shard_rows": 0 if shards is None else len(shards),
            "prompts": len(self._material.prompts),
            "concept_judge": "classifier of the labelled texts" if judge is None else "given by the caller",
        }

    def verdict(self, judged: Judged) -> Verdict:
        """Everything that the material allows to be said about one SAE."""
        hook = self._hook(judged)
        known = self._material.known
        labelled = self._labelled(judged, hook)
        return Verdict(
            judged,
            hook,
            judge_reconstruction(judged, self._activations(judged, hook)),
            spliced=self._spliced(judged, hook),
            recovery=None if known is None else judge_dictionary(judged.decoder, known),
            labelled=labelled,
            steering=self._steering(judged, hook, labelled),
            training=read_log(judged.folder / TRAINING_LOG),
        )

    def _hook(self, judged: Judged) -> Hook | None:
        """Where the SAE is judged: its own hook, or that of the shards or of the caller where it has none."""
        shards = self._material.shards
        if shards is not None:
            if judged.d_in != shards.d_in:
                raise ConfigError(
                    f"expected an SAE of the shards' width {shards.d_in}, {judged.name} has {judged.d_in}"
                )
            if judged.hook is not None and judged.hook != shards.hook:
                raise ConfigError(
                    f"expected an SAE of the shards' hook {shards.hook.name}, "
                    f"{judged.name} is of {judged.hook.name}"
                )
        hook = judged.hook or self._material.hook or (shards.hook if shards else None)
        if hook is None and self._material.texts:
            raise ConfigError(f"expected --layer and --hook: the files of {judged.name} do not name its hook")
        return hook

    def _at(self, judged: Judged, hook: Hook | None) -> HookedModel:
        """The model at a hook. It is loaded when it is first needed."""
        assert hook is not None
        if self._model is None:
            self._model = load_model(self._material.model, hook, self._material.device)
        elif self._model.hook != hook:
            self._model = HookedModel(self._model.model, self._model.tokenizer, hook, self._model.device)
        if self._model.width != judged.d_in:
            raise ConfigError(
                f"expected an SAE of the model's width {self._model.width}, {judged.name} has {judged.d_in}"
            )
        return self._model

    def _activations(self, judged: Judged, hook: Hook | None) -> Iterator[Tensor]:
        """The last rows of the shards, which a trainer leaves out, or the texts that measure."""
        shards = self._material.shards
        if shards is None:
            table, data = self._collected(self._at(judged, hook))
            found = data.measure if data is not None else table
            assert found is not None
            yield found.x
            return
        first = max(0, len(shards) - self._settings.tokens)
        starts = range(first, len(shards), _SHARD_BATCH)
        for start in self._bar.track(starts, description=f"{judged.name}: reconstruction"):
            yield shards.activations(start, min(start + _SHARD_BATCH, len(shards))).float()

    def _collected(self, model: HookedModel) -> tuple[TokenTable | None, Prepared | None]:
        """The activations of the texts that measure, or of both halves; those of one hook are kept."""
        if self._tables is None or self._tables[0] != model.hook:
            measure = self._collect(model, self._halves[1])
            if self.classifier is None:
                self._tables = (model.hook, measure, None)
            else:
                choose = self._collect(model, self._halves[0])
                embeddings = self.classifier.embeddings([text for text, _ in self._halves[1]])
                self._tables = (model.hook, None, prepare(choose, measure, embeddings))
        return self._tables[1:]

    def _collect(self, model: HookedModel, texts: Sequence[Text]) -> TokenTable:
        settings, stage = self._settings, self._stage(f"texts at {model.hook.name}", len(texts))
        found = collect(
            model,
            texts,
            self._labels,
            limit=settings.text_tokens,
            tokens=settings.tokens,
            progress=stage,
        )
        # A budget of tokens may have ended it early.
        stage(len(texts) - found.texts)
        return found

    def _spliced(self, judged: Judged, hook: Hook | None) -> Spliced | None:
        texts = [text for text, _ in self._halves[1][: self._settings.splice_texts]]
        if not texts:
            return None
        model, stage = self._at(judged, hook), self._stage(f"{judged.name}: CE and KL", len(texts))
        return judge_splice(model, judged, texts, limit=self._settings.text_tokens, progress=stage)

    def _labelled(self, judged: Judged, hook: Hook | None) -> Labelled | None:
        if not self._labels:
            return None
        _, data = self._collected(self._at(judged, hook))
        assert data is not None
        tokens = len(data.choose.x) + len(data.measure.x)
        return judge_labelled(judged, data, self._stage(f"{judged.name}: concepts", tokens))

    def _steering(self, judged: Judged, hook: Hook | None, labelled: Labelled | None) -> Steering | None:
        if labelled is None or not self._material.prompts:
            return None
        model, settings = self._at(judged, hook), self._settings
        _, data = self._collected(model)
        judge = self._material.judge or self.classifier
        assert data is not None
        assert judge is not None
        seed, task = settings.seed, self._bar.add_task(f"{judged.name}: steering", total=None)
        return judge_steering(
            model,
            self._material.prompts,
            make_candidates(judged, model.hook, labelled, data, features=settings.steer_features, seed=seed),
            typical_texts(self._halves[0]),
            judge,
            SteeringSettings(tokens=settings.steer_tokens, temperature=settings.temperature, seed=seed),
            lambda done, of: self._bar.update(task, completed=done, total=of),
        )

    def _stage(self, description: str, total: int) -> Callable[[int], None]:
        task = self._bar.add_task(description, total=total)
        return lambda count: self._bar.advance(task, count)


def _labels(material: Material) -> tuple[str, ...]:
    """The labels to judge by: none unless every text has one.

    Raises: ConfigError if labels are needed, or given, but do not suffice.
    """
    given = [label for _, label in material.texts if label is not None]
    complete = bool(given) and len(given) == len(material.texts)
    if given and not complete:
        raise ConfigError(f"expected a label on all {len(material.texts)} texts or on none, got {len(given)}")
    if material.prompts and not complete:
        raise ConfigError("expected labelled texts to judge steering with, got texts without labels")
    labels = labels_of(material.texts)
    if complete and len(labels) < 2:
        raise ConfigError(f"expected at least two different labels, got {list(labels)}")
    for label in labels:
        if given.count(label) < 2:
            raise ConfigError(f"expected at least two texts of each label, got one of {label!r}")
    return labels
