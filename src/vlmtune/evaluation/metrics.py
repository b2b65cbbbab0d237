"""All metrics by name.

To add one, write the function of one row, make a ``Metric`` of it beside its like (texts, captions,
classes, boxes, pictures) and name it in ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from vlmtune.errors import UsageError
from vlmtune.evaluation.box_metrics import BOX_METRICS
from vlmtune.evaluation.captions import CAPTION_METRICS
from vlmtune.evaluation.classes import MACRO_F1
from vlmtune.evaluation.detection import DETECTION_METRICS
from vlmtune.evaluation.metric import Metric, statistics
from vlmtune.evaluation.render_match import RENDER_MATCH
from vlmtune.evaluation.text_metrics import TEXT_METRICS

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *TEXT_METRICS,
        MACRO_F1,
        *CAPTION_METRICS,
        RENDER_MATCH,
        *BOX_METRICS,
        *DETECTION_METRICS,
    )
}


def find(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: If there is none; names the nearest and all.
    """
    if name in METRICS:
        return METRICS[name]
    nearest = get_close_matches(name, METRICS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"there is no metric {name!r}; {hint}The metrics are {', '.join(METRICS)}.")


def row_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """Each metric of texts: its value of every row alone, in the order of the rows."""
    return {
        metric.name: metric.alone(statistics(metric, predictions, references)).tolist()
        for metric in map(find, names)
    }
