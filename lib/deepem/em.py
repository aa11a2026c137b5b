"""The E-step: which proposal does each weak label of a scan describe?

Zhu et al. 2018, Eq. 5, for every label of a scan, in logs, as pure functions over arrays; and what
goes beyond the paper: a null hypothesis and joint assignment. P proposals, L labels of one scan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import entr, logsumexp

logger = logging.getLogger(__name__)

MAX_JOINT_LABELS = 12
"""Joint assignment visits every subset of the labels of a scan."""

_NO_WAY_OUT = -60.0
"""Log weight of the null hypothesis where joint assignment has more labels than proposals."""

_IMPOSSIBLE = 1e6
"""Cost of an assignment that has no weight at all."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the labels of one scan say about its proposals.

    posterior: (L, P), null: (L,), probabilities; a row of the first and its null sum to 1.
    log_evidence: (L,) nats, log of the sum over proposals (and null) of p(proposal) p(label | it);
    -inf where nothing could explain the label. log_weight: (L, P) and log_null: (L,), the terms of
    that sum. joint: whether no proposal may serve two labels.
    """

    posterior: np.ndarray
    null: np.ndarray
    log_evidence: np.ndarray
    log_weight: np.ndarray
    log_null: np.ndarray
    joint: bool

    @property
    def entropy(self) -> np.ndarray:
        """(L,) nats over proposals and null: how ambiguous each label is."""
        return entr(np.column_stack([self.posterior, self.null])).sum(1)


def e_step(
    log_prior: np.ndarray,
    log_observation: np.ndarray,
    *,
    log_null: float | np.ndarray = -np.inf,
    joint: bool = False,
) -> Posterior:
    """Posterior over the proposals of one scan for each of its weak labels (Eq. 5).

    log_prior: (P,) log probability of the detector. log_observation: (L, P) log p(label |
    proposal), the sum of the factors a label has; 0 for one that says nothing. log_null:
    log weight of "the detector missed this nodule" for each label (L,) or for all, -inf switches it
    off. joint: no two labels describe the same nodule; the posterior is then the exact marginal
    over all such assignments.

    A label without any proposal, or with weight nowhere, goes to the null hypothesis entirely.
    """
    log_prior = np.asarray(log_prior, dtype=np.float64)
    log_observation = np.asarray(log_observation, dtype=np.float64)
    if log_prior.ndim != 1 or log_observation.shape[1:] != log_prior.shape:
        raise ValueError(
            "log_prior, log_observation: expected (P,) and (L, P), got "
            f"{log_prior.shape} and {log_observation.shape}"
        )
    if np.isnan(log_prior).any() or np.isnan(log_observation).any():
        raise ValueError("log_prior, log_observation: expected no NaN")
    log_weight = log_prior + log_observation
    log_null = np.broadcast_to(np.asarray(log_null, dtype=np.float64), len(log_weight))
    with_null = np.column_stack([log_weight, log_null])
    log_evidence = logsumexp(with_null, axis=1)
    if joint and len(log_weight) > MAX_JOINT_LABELS:
        logger.warning("%d labels in one scan: assigned one by one", len(log_weight))
        joint = False
    if joint and len(log_weight) > 1:
        posterior = _joint_marginals(log_weight, log_null)
    else:
        explained = np.where(np.isfinite(log_evidence), log_evidence, 0.0)
        posterior = np.exp(log_weight - explained[:, None])
    posterior = np.clip(posterior, 0.0, 1.0)
    total = posterior.sum(1)
    certain = (
        np.isneginf(log_null) & (total > 0) & (not joint)
    )  # no rounding left over for the null
    null = np.where(certain, 0.0, np.clip(1.0 - total, 0.0, 1.0))
    return Posterior(posterior, null, log_evidence, log_weight, log_null, joint)


def _joint_marginals(log_weight: np.ndarray, log_null: np.ndarray) -> np.ndarray:
    """(L, P) marginals over all assignments in which a proposal serves at most one label.

    Proposals are visited one by one; the state is the set of labels that are served already, so
    sums before and after a proposal give every marginal at once: O(P * 2^L * L).
    """
    labels, proposals = log_weight.shape
    sets = np.arange(1 << labels)
    holds = (sets[:, None] >> np.arange(labels)) & 1 == 1  # (2^L, L)
    before = np.full((proposals + 1, len(sets)), -np.inf)
    before[0, 0] = 0.0
    for at in range(proposals):
        before[at + 1] = before[at]
        for label in range(labels):
            served = sets[holds[:, label]]
            gained = before[at, served ^ (1 << label)] + log_weight[label, at]
            before[at + 1, served] = np.logaddexp(before[at + 1, served], gained)
    # after[s]: what the remaining proposals and the null add to the served labels s.
    after = ~holds @ np.maximum(log_null, _NO_WAY_OUT)
    total = logsumexp(before[proposals] + after)
    marginal = np.zeros((labels, proposals))
    for at in reversed(range(proposals)):
        earlier = after.copy()
        for label in range(labels):
            open_ = sets[~holds[:, label]]
            gained = log_weight[label, at] + after[open_ | (1 << label)]
            with np.errstate(invalid="ignore"):
                marginal[label, at] = np.exp(logsumexp(before[at, open_] + gained) - total)
            earlier[open_] = np.logaddexp(earlier[open_], gained)
        after = earlier
    return marginal


def most_probable(posterior: Posterior, rng: np.random.Generator | None = None) -> list[list[int]]:
    """MAP (Eq. 6): for each label the proposal with the largest posterior, the first of equals.

    Empty where the null hypothesis is larger or there is nothing to choose. With joint assignment
    the most probable assignment as a whole. ``rng`` is not used; all choices take one.
    """
    if posterior.joint:
        return _best_assignment(posterior)
    chosen: list[list[int]] = []
    for row, null in zip(posterior.posterior, posterior.null, strict=True):
        best = int(row.argmax()) if row.size else -1
        chosen.append([best] if best >= 0 and row[best] > 0 and row[best] >= null else [])
    return chosen


def _best_assignment(posterior: Posterior) -> list[list[int]]:
    """The assignment with the largest product of weights, by the Hungarian method."""
    labels, proposals = posterior.log_weight.shape
    # One private null column per label: any number of labels may be unexplained.
    cost = np.full((labels, proposals + labels), _IMPOSSIBLE)
    cost[:, :proposals] = np.minimum(-posterior.log_weight, _IMPOSSIBLE)
    own_null = proposals + np.arange(labels)
    cost[np.arange(labels), own_null] = -np.maximum(posterior.log_null, _NO_WAY_OUT)
    _, columns = linear_sum_assignment(cost)
    return [[int(column)] if column < proposals else [] for column in columns]


def sampled(posterior: Posterior, rng: np.random.Generator, draws: int = 2) -> list[list[int]]:
    """``draws`` proposals for each label, drawn from the posterior with replacement (Eq. 7).

    A draw that falls on the null hypothesis gives nothing. With joint assignment every draw is one
    whole assignment from the joint posterior.
    """
    chosen: list[list[int]] = [[] for _ in posterior.null]
    for _ in range(draws):
        for label, proposal in enumerate(_draw(posterior, rng)):
            if proposal is not None:
                chosen[label].append(proposal)
    return chosen


def _draw(posterior: Posterior, rng: np.random.Generator) -> list[int | None]:
    proposals = posterior.posterior.shape[1]
    drawn: list[int | None] = []
    log_weight = posterior.log_weight.copy()
    current = posterior
    for _ in range(len(posterior.null)):
        chances = np.append(current.posterior[0], current.null[0])
        at = int(rng.choice(proposals + 1, p=chances / chances.sum()))
        drawn.append(at if at < proposals else None)
        log_weight = log_weight[1:]
        if posterior.joint:  # the next label, given what this one took
            if at < proposals:
                log_weight[:, at] = -np.inf
            zeros = np.zeros(proposals)
            left_null = posterior.log_null[len(drawn) :]
            current = e_step(zeros, log_weight, log_null=left_null, joint=True)
        else:
            left = slice(len(drawn), None)
            current = Posterior(
                posterior.posterior[left], posterior.null[left], posterior.log_evidence[left],
                log_weight, posterior.log_null[left], False,
            )  # fmt: skip
    return drawn


def soft(posterior: Posterior, rng: np.random.Generator | None = None) -> list[list[int]]:
    """Every proposal that takes at least a hundredth of a label; weigh each by its posterior."""
    return [np.flatnonzero(row >= 0.01).tolist() for row in posterior.posterior]


Choice = Callable[[Posterior, np.random.Generator], list[list[int]]]

METHODS: dict[str, Choice] = {"map": most_probable, "sampling": sampled, "soft": soft}
"""Ways to choose, by name; each takes a posterior and a random generator."""


@dataclass(frozen=True)
class EmConfig:
    """EM on weak labels. The defaults go beyond the paper where that was measured to help.

    method: one of `METHODS`. rounds: how many. warm_start: share of the training on strong scans
    alone before the first round (0 where a model to start from is given). weak_share: of the
    patches of a step, since there are many more weak scans than strong ones. scans_per_round: as
    many weak scans are drawn for a round, all if there are fewer (the paper: 1/16 of 17,602).
    null, joint, odds: see `explain`. certain: a proposal with less of a label is not taught to be
    its nodule, but for the best three labels in ten (the paper: 0, every best guess is taught).
    best_proposes: the E-step is done by the network that was best on the validation scans so far,
    the start included, not by the newest (the paper). size, attenuation: what the record says of
    these is evidence, and the size is taught. wrong_lobe: assumed share of wrong lobes.
    slice_off_mm: assumed standard deviation of the error of reported slices. clearance_mm:
    background this close to a reported slice, and 2 * slice_off_mm more, teaches nothing. rejected:
    where the reported nodule is known by now the rest is background all the same, and proposals
    that no label can mean are taught to be none (the paper leaves them alone). min_logit: of
    proposals (the paper: -3).
    """

    method: str = "map"
    rounds: int = 3
    warm_start: float = 0.5
    weak_share: float = 0.75
    scans_per_round: int = 200
    null: float = 0.1
    joint: bool = True
    odds: bool = True
    certain: float = 0.5
    best_proposes: bool = True
    size: bool = True
    attenuation: bool = True
    wrong_lobe: float = 0.0
    slice_off_mm: float = 0.0
    clearance_mm: float = 12.0
    rejected: bool = True
    min_logit: float = -3.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {sorted(METHODS)}, got {self.method!r}")
        for name in ("rounds", "scans_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("warm_start", "certain", "wrong_lobe"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if not 0 < self.weak_share <= 1:
            raise ValueError(f"weak_share: expected (0, 1], got {self.weak_share}")
        for name in ("null", "slice_off_mm", "clearance_mm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


PAPER = EmConfig(
    null=0.0, joint=False, odds=False, certain=0.0, best_proposes=False, size=False,
    attenuation=False, rejected=False,
)  # fmt: skip
"""Zhu et al. 2018 without anything of ours."""
