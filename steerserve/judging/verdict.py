"""What SAEs are judged on, and what is found about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steerserve.sae import Hook
from steerserve.training.shards import ShardReader

from .classifier import ConceptJudge, TextClassifier
from .dictionary import Recovery
from .judged import Judged
from .labelled import Labelled
from .outcomes import Steering
from .reconstruction import Reconstruction
from .settings import JudgeSettings
from .splice import Spliced
from .texts import Text

__all__ = ["Judgement", "Material", "Verdict"]


@dataclass(frozen=True, eq=False)
class Material:
    """What SAEs are judged on; each part that is missing leaves out what it is needed for.

    Attributes:
        model: path or name of the language model.
        texts: for the CE and KL scores, and, with labels, for concepts.
        shards: for the reconstruction, which is otherwise measured on the texts.
        prompts: to steer. judge: of the concept axis; by default a classifier trained on the texts.
        known: [K, d] planted features.
        hook: for SAEs whose files name none.
        device: where model and SAEs run.
    """

    model: str
    texts: Sequence[Text] = ()
    shards: ShardReader | None = None
    prompts: Sequence[str] = ()
    judge: ConceptJudge | None = None
    known: Tensor | None = None
    hook: Hook | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Verdict:
    """What was found about one SAE; None for what could not be judged.

    Attributes:
        hook: where it was judged, None if that was never needed.
        training: the rows of its training log, if there is one beside it.
    """

    judged: Judged
    hook: Hook | None
    reconstruction: Reconstruction
    spliced: Spliced | None = None
    recovery: Recovery | None = None
    labelled: Labelled | None = None
    steering: Steering | None = None
    training: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Judgement:
    """All verdicts, and what they rest on.

    Attributes:
        facts: about the material. classifier: of the texts, where they are labelled.
    """

    model: str
    settings: JudgeSettings
    facts: dict[str, Any]
    verdicts: list[Verdict]
    classifier: TextClassifier | None = None
