"""Weak labels of one scan against its proposals: where the E-step meets the scan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import log_expit

from deepem.em import Posterior, e_step
from deepem.nodule import Proposal, WeakLabel
from deepem.observation import ObservationModel
from deepem.scan import Scan


def explain(
    labels: Sequence[WeakLabel],
    proposals: Sequence[Proposal],
    scan: Scan,
    model: ObservationModel,
    *,
    null: float = 0.0,
    joint: bool = False,
    odds: bool = False,
) -> Posterior:
    """Posterior of the labels of one scan over its proposals, in the order of both.

    labels: with their slices in patient space (`weak_labels.in_patient_space`); an unknown lobe or
    slice contributes no factor. null: weight of the null hypothesis, as the probability of a
    proposal that fits the label perfectly and would be as likely; 0 switches it off. odds: weigh a
    proposal by p / (1 - p) instead of the detector's p (Eq. 5, 6). That is "this one is the nodule
    and the others are none", and still tells proposals apart that are all close to 1.
    """
    unplaced = [label for label in labels if label.to_be_placed]
    if unplaced:
        raise ValueError(f"labels: expected slices as z_lps_mm, got {unplaced[0]}")
    z_lps_mm = np.array([np.nan if one.z_lps_mm is None else one.z_lps_mm for one in labels])
    center_lps_mm = np.array([one.nodule.center_lps_mm for one in proposals]).reshape(-1, 3)
    diameter_mm = np.array([one.nodule.diameter_mm for one in proposals])
    logit = np.array([one.logit for one in proposals], dtype=np.float64)
    log_prior = logit if odds else log_expit(logit)  # the logit is the log of the odds
    hu = scan.mean_hu(center_lps_mm, diameter_mm)
    log_p = model.log_observation(labels, z_lps_mm, center_lps_mm, diameter_mm, scan.lungs, hu)
    peak = np.array([model.log_peak(label) for label in labels])
    log_null = (math.log(null) if null > 0 else -np.inf) + peak
    return e_step(log_prior, log_p, log_null=log_null, joint=joint)
