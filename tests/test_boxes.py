import numpy as np
import pytest
import torch

from deepem.boxes import assign, cubes, decode, suppress
from deepem.network import PRESETS, VALUES_PER_ANCHOR

MAP = (10, 12, 14)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("diameter", np.arange(3, 30.5, 0.5).tolist())
def test_every_diameter_gets_a_positive_anchor_wherever_it_lies(preset, diameter):
    anchors = PRESETS[preset].anchors_mm
    rng = np.random.default_rng(round(diameter * 10))
    for center in rng.uniform(12, 28, (5, 3)):
        targets = assign(torch.tensor(center[None]).float(), torch.tensor([diameter]), MAP, anchors)
        assert len(targets.positive) >= 4
        assert (targets.nodule == 0).all()
        assert not np.intersect1d(targets.positive, targets.negative).size


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_encoded_decodes_to_the_nodules(preset):
    anchors = PRESETS[preset].anchors_mm
    center = torch.tensor([[11.3, 20.9, 30.2], [28.0, 7.4, 44.4]])
    diameter = torch.tensor([5.5, 17.0])
    targets = assign(center, diameter, MAP, anchors)
    flat = torch.full((len(anchors) * int(np.prod(MAP)), VALUES_PER_ANCHOR), -9.0)
    flat[targets.positive, 0] = 4.0
    flat[targets.positive, 1:] = targets.regression
    maps = flat.unflatten(0, (len(anchors), *MAP)).movedim(-1, 1).flatten(0, 1)

    logit, found, size = decode(maps, anchors, -3.0, 1000)
    assert len(logit) == len(targets.positive)
    keep = suppress(logit, found, size, 0.1)
    order = keep[found[keep, 0].argsort()]
    torch.testing.assert_close(found[order], center, atol=1e-4, rtol=0)
    torch.testing.assert_close(size[order], diameter, atol=1e-4, rtol=0)


def test_a_nodule_outside_the_patch_is_neither_found_nor_denied():
    anchors = (4.0, 8.0)
    none = assign(torch.empty(0, 3), torch.empty(0), MAP, anchors)
    assert len(none.negative) == 2 * np.prod(MAP) and len(none.positive) == 0
    outside = assign(torch.tensor([[-2.0, 20, 20]]), torch.tensor([10.0]), MAP, anchors)
    assert len(outside.positive) == 0
    assert 0 < len(none.negative) - len(outside.negative) < 100


def test_two_nodules_that_share_their_best_anchors_both_train():
    center = torch.tensor([[20.0, 20, 20], [21.0, 20, 20]])
    targets = assign(center, torch.tensor([6.0, 6.5]), MAP, (6.0,))
    assert set(targets.nodule.tolist()) == {0, 1}


def test_a_cube_by_hand():
    torch.testing.assert_close(
        cubes(torch.tensor([[1.0, 2, 3]]), torch.tensor([4.0])),
        torch.tensor([[-1.0, 0, 1, 3, 4, 5]]),
    )


def test_decoding_keeps_the_best_above_the_threshold():
    maps = torch.zeros(5, 2, 2, 2)
    maps[0] = torch.arange(8.0).reshape(2, 2, 2)
    logit, center, diameter = decode(maps, (6.0,), 5.5, 10)
    assert logit.tolist() == [7, 6]
    assert center.tolist() == [[5.5, 5.5, 5.5], [5.5, 5.5, 1.5]]  # cell 1 covers voxels 4..7
    assert diameter.tolist() == [6, 6]
    assert len(decode(maps, (6.0,), -1.0, 3)[0]) == 3


def test_a_place_is_proposed_once_whatever_the_sizes():
    """A cube of 6 in one of 14 has an IoU of .08; the better one stays, and the neighbour."""
    center = torch.tensor([[20.0, 20, 20], [21.0, 20, 20], [30.0, 20, 20]])
    diameter = torch.tensor([14.0, 6.0, 6.0])
    assert suppress(torch.tensor([3.0, 2.0, 1.0]), center, diameter, 0.1).tolist() == [0, 2]
    assert suppress(torch.tensor([2.0, 3.0, 1.0]), center, diameter, 0.1).tolist() == [1, 2]
    assert suppress(torch.empty(0), torch.empty(0, 3), torch.empty(0), 0.1).tolist() == []
