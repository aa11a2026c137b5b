import itertools
import math

import numpy as np
import pandas as pd
import pytest

from deepem.em import MAX_JOINT_LABELS, e_step, most_probable, sampled, soft
from deepem.nodule import ATTENUATIONS, Lobe
from deepem.observation import (
    LOBES,
    LobeModel,
    SizeModel,
    SliceModel,
    log_attenuation_probability,
)
from deepem.scan import HU_WINDOW, SPACING_MM, Scan
from deepem.volume import read_volume, resample


def test_the_posterior_by_hand():
    """Two proposals, p = .8 and .4; the label fits them 1 : 3. Posterior .8 : 1.2 = .4 : .6."""
    prior = np.log([0.8, 0.4])
    result = e_step(prior, np.log([[0.1, 0.3]]))
    np.testing.assert_allclose(result.posterior, [[0.4, 0.6]])
    np.testing.assert_allclose(result.log_evidence, [math.log(0.08 + 0.12)])
    assert result.null.tolist() == [0]
    assert most_probable(result) == [[1]]


def test_the_null_hypothesis_by_hand():
    result = e_step(np.log([0.8, 0.4]), np.log([[0.1, 0.3]]), log_null=math.log(0.3))
    np.testing.assert_allclose(result.posterior, [[0.16, 0.24]])
    np.testing.assert_allclose(result.null, [0.6])
    np.testing.assert_allclose(result.log_evidence, [math.log(0.5)])
    assert most_probable(result) == [[]]


def test_every_label_of_a_scan_is_answered():
    """The authors' loop overwrites the proposals and skips every label after the first."""
    prior = np.log(np.array([0.9, 0.5, 0.7]))
    observation = np.log(np.eye(3) * 0.9 + 0.05)
    result = e_step(prior, observation)
    assert most_probable(result) == [[0], [1], [2]]
    np.testing.assert_allclose(result.posterior.sum(1), 1)
    for label in range(3):
        alone = e_step(prior, observation[[label]])
        np.testing.assert_allclose(result.posterior[label], alone.posterior[0])


def test_hard_cases_have_a_defined_answer():
    nothing = e_step(np.empty(0), np.empty((2, 0)))
    assert nothing.posterior.shape == (2, 0) and nothing.null.tolist() == [1, 1]
    assert most_probable(nothing) == [[], []] and np.isneginf(nothing.log_evidence).all()
    assert sampled(nothing, np.random.default_rng(0)) == [[], []]
    impossible = e_step(np.log([0.5, 0.5]), np.full((1, 2), -np.inf))
    assert impossible.null.tolist() == [1] and most_probable(impossible) == [[]]
    tied = e_step(np.log([0.5, 0.5]), np.zeros((1, 2)))
    np.testing.assert_allclose(tied.posterior, [[0.5, 0.5]])
    assert most_probable(tied) == [[0]]
    no_label = e_step(np.log([0.5]), np.empty((0, 1)), joint=True)
    assert most_probable(no_label) == []
    with pytest.raises(ValueError, match=r"expected \(P,\) and \(L, P\), got \(2,\) and \(1, 3\)"):
        e_step(np.zeros(2), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected no NaN"):
        e_step(np.array([np.nan]), np.zeros((1, 1)))


def by_enumeration(log_weight, log_null):
    """Marginals and the best of all assignments, by listing them."""
    labels, proposals = log_weight.shape
    marginal, total, best = np.zeros((labels, proposals)), 0.0, (-np.inf, None)
    log_nulls = np.broadcast_to(log_null, labels)
    for choice in itertools.product(range(-1, proposals), repeat=labels):
        taken = [proposal for proposal in choice if proposal >= 0]
        if len(set(taken)) < len(taken):
            continue
        log_p = sum(
            log_nulls[label] if proposal < 0 else log_weight[label, proposal]
            for label, proposal in enumerate(choice)
        )
        best = max(best, (log_p, choice))
        total += math.exp(log_p)
        for label, proposal in enumerate(choice):
            if proposal >= 0:
                marginal[label, proposal] += math.exp(log_p)
    return marginal / total, [[p] if p >= 0 else [] for p in best[1]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("log_null", [-1.0, np.array([-4.0, -0.5, -2.0])])
def test_joint_marginals_are_those_of_all_assignments(seed, log_null):
    rng = np.random.default_rng(seed)
    log_prior, log_observation = -rng.exponential(1, 4), -rng.exponential(2, (3, 4))
    log_observation[0, 1] = -np.inf
    result = e_step(log_prior, log_observation, log_null=log_null, joint=True)
    expected, best = by_enumeration(log_prior + log_observation, log_null)
    np.testing.assert_allclose(result.posterior, expected, atol=1e-12)
    np.testing.assert_allclose(result.null, 1 - expected.sum(1), atol=1e-12)
    assert most_probable(result) == best


def test_two_labels_never_claim_one_nodule():
    """Both like proposal 0 best; alone both take it, together the second gets its own."""
    prior = np.log([0.9, 0.3])
    observation = np.log([[0.9, 0.2], [0.8, 0.4]])
    assert most_probable(e_step(prior, observation)) == [[0], [0]]
    together = e_step(prior, observation, joint=True)
    assert most_probable(together) == [[0], [1]]
    assert together.posterior[:, 0].sum() <= 1 + 1e-12
    rng = np.random.default_rng(0)
    for _ in range(50):
        (first,), (second,) = sampled(together, rng, draws=1)
        assert {first, second} == {0, 1}


def test_more_labels_than_proposals_leaves_one_unexplained():
    result = e_step(np.log([0.5]), np.log([[0.2], [0.4]]), joint=True)
    assert most_probable(result) == [[], [0]]
    np.testing.assert_allclose(result.null, [2 / 3, 1 / 3], rtol=1e-6)


def test_too_many_labels_for_joint_assignment_say_so(caplog):
    labels = MAX_JOINT_LABELS + 1
    result = e_step(np.zeros(2), np.zeros((labels, 2)), joint=True)
    assert not result.joint and "assigned one by one" in caplog.text
    np.testing.assert_allclose(result.posterior, 0.5)


def test_sampling_draws_twice_and_stops():
    """The authors' sampler appends every proposal behind the cut. Frequencies follow Eq. 5."""
    result = e_step(np.log([0.2, 0.3, 0.4]), np.zeros((1, 3)), log_null=math.log(0.1))
    rng = np.random.default_rng(1)
    draws = [sampled(result, rng)[0] for _ in range(4000)]
    assert max(map(len, draws)) == 2
    counts = np.bincount(np.concatenate([np.array(d, int) for d in draws]), minlength=3)
    np.testing.assert_allclose(counts / 8000, [0.2, 0.3, 0.4], atol=0.02)
    assert soft(result) == [[0, 1, 2]]
    again = [sampled(result, np.random.default_rng(5))[0] for _ in range(2)]
    assert again[0] == again[1]


def test_eq_3_by_hand():
    model = SliceModel(slack_mm=1.627, sigma_mm=2.381)
    flat = math.log(2 / math.sqrt(2 * math.pi * 2.381**2))
    np.testing.assert_allclose(
        model.log_density(np.array([0.0, -1.6, 1.627, 1.627 + 2.381, -(1.627 + 4.762)])),
        [flat, flat, flat, flat - 0.5, flat - 2],
    )
    fitted = SliceModel.fitted(np.array([4.0, 8.0]))
    assert (fitted.slack_mm, fitted.sigma_mm) == (2, 1)
    assert SliceModel(2.0, 3.0).blurred(4.0) == SliceModel(2.0, 5.0)
    with pytest.raises(ValueError, match="expected two different ones, got 1"):
        SliceModel.fitted(np.array([4.0]))
    with pytest.raises(ValueError, match="expected 0 or more and more than 0, got 1.627 and 0"):
        SliceModel(sigma_mm=0.0)


def test_eq_3_fits_luna16(real_data):
    from deepem.tables import read_annotations

    annotations = read_annotations(real_data / "luna16" / "annotations.csv")
    diameters = [n.diameter_mm for nodules in annotations.values() for n in nodules]
    fitted = SliceModel.fitted(np.array(diameters))
    assert fitted.slack_mm == pytest.approx(1.627, abs=1e-3)
    assert fitted.sigma_mm == pytest.approx(2.381, abs=1e-3)


PLACES = {
    Lobe.RUL: (0.2, 0.5, 0.85), Lobe.RML: (0.25, 0.15, 0.4), Lobe.RLL: (0.2, 0.8, 0.25),
    Lobe.LUL: (0.8, 0.5, 0.85), Lobe.LINGULA: (0.8, 0.15, 0.4), Lobe.LLL: (0.8, 0.8, 0.25),
}  # fmt: skip


def test_the_anatomical_start_knows_where_the_lobes_are():
    relative = np.array(list(PLACES.values()))
    p = np.exp(LobeModel.anatomical().log_probability(relative))
    np.testing.assert_allclose(p.sum(1), 1)
    assert [LOBES[at] for at in p.argmax(1)] == list(PLACES)
    noisy = np.exp(LobeModel.anatomical(wrong=0.1).log_probability(relative))
    np.testing.assert_allclose(noisy.sum(1), 1)
    assert noisy.min() >= 0.1 * (1 - p.max()) / 5 and noisy.max() <= 0.9


def test_refitting_learns_what_it_sees_and_keeps_what_it_does_not():
    """All labels are from the right upper lobe of patients whose fissure lies lower."""
    rng = np.random.default_rng(0)
    seen = rng.uniform([0.1, 0.4, 0.3], [0.4, 0.7, 0.5], (200, 3))
    before = LobeModel.anatomical()
    after = before.refitted(seen, [Lobe.RUL] * 200, np.ones(200))
    at = LOBES.index(Lobe.RUL)
    gain = after.log_probability(seen)[:, at].mean() - before.log_probability(seen)[:, at].mean()
    assert gain > 0.5
    left = np.array([PLACES[lobe] for lobe in (Lobe.LUL, Lobe.LINGULA, Lobe.LLL)])
    names = [LOBES[k] for k in after.log_probability(left).argmax(1)]
    assert names == [Lobe.LUL, Lobe.LINGULA, Lobe.LLL]
    weightless = before.refitted(seen, [Lobe.RUL] * 200, np.zeros(200))
    relative = np.array(list(PLACES.values()))
    np.testing.assert_allclose(
        np.exp(weightless.log_probability(relative)),
        np.exp(before.log_probability(relative)),
        atol=0.08,
    )


def test_the_kind_by_its_density():
    p = np.exp(log_attenuation_probability(np.array([-50.0, -330.0, -600.0, 400.0, -1000.0])))
    np.testing.assert_allclose(p.sum(1), 1)
    kinds = [ATTENUATIONS[at] for at in p.argmax(1)]
    assert kinds == ["solid", "part_solid", "ground_glass", "solid", "ground_glass"]
    assert p[0, 0] / p[0, 1] == pytest.approx(math.exp(0.5 * (280 / 170) ** 2))
    assert p[0, 0] / p[0, 2] == pytest.approx(math.exp(0.5 * (550 / 130) ** 2) * 130 / 170)


def test_what_readers_called_solid_is_solid(real_data):
    """60 nodules of LIDC-IDRI; texture 1 is ground glass, 4 nearly and 5 solid."""
    folder = real_data / "lidc_nodule_vois"
    of = pd.read_csv(folder / "metadata_by_nodule.csv").set_index(["patient_id", "nodule_id"])
    p_solid = []
    for file in sorted((folder / "image").iterdir()):
        patient, number = file.name.removesuffix(".nii.gz").split("_R_")
        nodule = of.loc[(patient, int(number))]
        volume = read_volume(file)
        center_lps_mm = nodule[["coordX", "coordY", "coordZ"]].to_numpy(float)
        image, grid = resample(volume, *volume.grid.extent_lps_mm(), SPACING_MM)
        image = np.interp(image, HU_WINDOW, (0, 255)).astype(np.uint8)
        scan = Scan(patient, image, grid, lungs=None, fingerprint="")
        hu = scan.mean_hu(center_lps_mm, np.array([nodule["diameter_mm"]]))
        p = np.exp(log_attenuation_probability(hu))[0]
        if nodule["Texture_value"] >= 4:
            p_solid.append(p[ATTENUATIONS.index("solid")])
        else:
            assert p.argmax() == ATTENUATIONS.index("ground_glass")
    assert len(p_solid) == 59
    assert np.mean(p_solid) > 0.7 and np.median(p_solid) > 0.75


def test_the_size_factor_prefers_the_reported_size():
    density = SizeModel().log_density(8.0, np.array([4.0, 8.0, 16.0]))
    assert density.argmax() == 1 and density[0] == pytest.approx(density[2])
