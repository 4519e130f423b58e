"""Judging SAEs: reconstruction, the model's own loss, concepts, steering, and the report of all of it."""

from steerserve.training.evaluate import DetectorCounts, Evaluation, evaluate

from .judged import Judged, open_judged
from .page import to_html
from .report import to_json
from .run import judge_all
from .settings import JudgeSettings
from .verdict import Judgement, Material, Verdict

__all__ = [
    "DetectorCounts",
    "Evaluation",
    "JudgeSettings",
    "Judged",
    "Judgement",
    "Material",
    "Verdict",
    "evaluate",
    "judge_all",
    "open_judged",
    "to_html",
    "to_json",
]
