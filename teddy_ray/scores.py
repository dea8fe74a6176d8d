"""DD-Ranking's scores of a distilled set, on accuracies as fractions.

Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", 2025. Theirs searches rates on the test
split and mixes per cent with fractions; here all accuracies are fractions, and searches use the validation part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from teddy_ray.records import Row

WEIGHT = 0.5
"""w of LRS and gamma of ARS."""


def scores(rows: Mapping[str, Row]) -> dict[str, float | None]:
    """ior, hlr, lrs and ars of the first student's rows; None where a control was not trained.

    ior: improvement over random, under equal labels. hlr: hard-label recovery, what hard labels miss of the whole
    training set (less is better). lrs: label-robust score. ars: augmentation-robust score. Both lie in [0, 1].
    """
    ior = _difference(rows, "distilled", "random_soft")
    hlr = _difference(rows, "full_data", "distilled_hard")
    plain = _difference(rows, "distilled_plain", "random_plain")
    lrs = None if ior is None or hlr is None else _normalised(WEIGHT * ior - (1 - WEIGHT) * hlr)
    ars = None if ior is None or plain is None else _normalised(WEIGHT * ior + (1 - WEIGHT) * plain)
    return {"ior": ior, "hlr": hlr, "lrs": lrs, "ars": ars}


def _difference(rows: Mapping[str, Row], first: str, second: str) -> float | None:
    return rows[first].mean - rows[second].mean if first in rows and second in rows else None


def _normalised(alpha: float) -> float:
    """[-1, 1] -> [0, 1]."""
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
