import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deepem.geometry import Grid
from deepem.masks import BANDS, band_values, nodule_mask
from deepem.nodule import Nodule, Proposal


def oblique(spacing_mm, shape, angles=(0, 0, 0), shear=0.0, flips=(1, 1, 1)):
    """A grid around the origin; shear: mm along y for each slice, as with a tilted gantry."""
    columns = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    columns = columns * np.multiply(spacing_mm, flips)
    columns[:, 2] += shear * columns[:, 1] / np.linalg.norm(columns[:, 1])
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = -columns @ (np.array(shape) - 1) / 2
    return Grid(affine, shape)


GRIDS = {
    "thin": oblique((0.7, 0.7, 0.7), (70, 70, 70)),
    "thick": oblique((0.7, 0.7, 5.0), (70, 70, 14)),
    "flipped": oblique((0.7, 0.8, 2.5), (70, 66, 24), flips=(1, -1, -1)),
    "oblique": oblique((0.7, 0.8, 5.0), (80, 70, 18), angles=(20, -35, 10)),
    "tilted": oblique((0.7, 0.7, 5.0), (70, 70, 14), shear=1.8),
    "coarse": oblique((2.0, 2.0, 3.0), (26, 26, 20)),
    "along_x": oblique((5.0, 0.7, 0.7), (14, 70, 70)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_drawn_has_the_measured_diameter(name, rng):
    """Along rows, columns and slices, within one voxel, for any place between the voxels."""
    grid = GRIDS[name]
    spacing = np.abs(np.diag(np.linalg.qr(grid.affine_lps_mm[:3, :3])[1]))  # slices: their normal
    for diameter in (1.0, 3.0, 4.2, 6.0, 9.7, 20.0):
        for _ in range(12):
            nodule = Nodule(tuple(rng.uniform(-5, 5, 3)), diameter)
            drawn = np.argwhere(nodule_mask([nodule], grid))
            slices = np.unique(drawn[:, 2])
            assert (np.diff(slices) == 1).all()
            widest = [
                np.ptp(drawn[drawn[:, 2] == k][:, axis]) + 1 for axis in (0, 1) for k in slices
            ]
            rows, columns = np.reshape(widest, (2, -1)).max(1)
            extent = np.array([rows, columns, len(slices)]) * spacing
            assert (np.abs(extent - diameter) <= spacing + 1e-9).all(), (extent, diameter)


@pytest.mark.parametrize("name", GRIDS)
def test_it_is_drawn_where_the_nodule_is(name, rng):
    grid = GRIDS[name]
    for diameter in (0.5, 3.0, 9.7, 20.0):
        nodule = Nodule(tuple(rng.uniform(-5, 5, 3)), diameter)
        drawn = np.argwhere(nodule_mask([nodule], grid))
        offset = grid.to_world(drawn) - nodule.center_lps_mm
        # Only half a voxel, along each axis, can lie between a drawn voxel and the sphere.
        slack = np.linalg.norm(grid.spacing_mm) / 2
        assert (np.linalg.norm(offset, axis=1) <= diameter / 2 + slack).all()
        q, r = np.linalg.qr(grid.affine_lps_mm[:3, :3])
        assert (np.abs(offset.mean(0) @ q) <= 0.6 * np.abs(np.diag(r))).all()


def test_every_voxel_well_inside_is_drawn_and_the_volume_is_right_in_thin_slices():
    grid = GRIDS["oblique"]
    nodule = Nodule((1.0, 2.0, -3.0), 24.0)
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    inside = np.linalg.norm(world - nodule.center_lps_mm, axis=-1) <= 12
    assert nodule_mask([nodule], grid)[inside].all()
    thin = GRIDS["thin"]
    volume = nodule_mask([nodule], thin).sum() * 0.7**3
    assert volume == pytest.approx(np.pi / 6 * 24**3, rel=0.02)


def test_the_first_is_on_top_and_the_rest_stays_zero():
    grid = GRIDS["thin"]
    near, far = Nodule((0, 0, 0), 8), Nodule((6, 0, 0), 8)
    mask = nodule_mask([near, far], grid, [2, 7])
    assert mask.dtype == np.uint8 and mask.shape == grid.shape
    assert set(np.unique(mask)) == {0, 2, 7}
    alone = nodule_mask([near], grid, [2])
    np.testing.assert_array_equal(mask == 2, alone == 2)
    np.testing.assert_array_equal(nodule_mask([near, far], grid), (mask > 0).astype(np.uint8))


def test_what_sticks_out_is_cut_and_what_is_outside_is_not_drawn():
    grid = GRIDS["thin"]
    corner = grid.extent_lps_mm()[1]
    eighth = nodule_mask([Nodule(tuple(corner), 14)], grid).sum()
    whole = nodule_mask([Nodule((0, 0, 0), 14)], grid).sum()
    assert eighth == pytest.approx(whole / 8, rel=0.2)
    assert not nodule_mask([Nodule(tuple(corner + 30), 14)], grid).any()
    assert not nodule_mask([], grid).any()


def test_values_must_be_labels():
    with pytest.raises(ValueError, match=r"values: expected 1 of 1\.\.255, got \[256\]"):
        nodule_mask([Nodule((0, 0, 0), 5)], GRIDS["thin"], [256])


def test_bands_follow_the_probability():
    findings = [Proposal(Nodule((0, 0, 0), 5), logit) for logit in (5.0, 1.0, -2.0)]
    assert [round(item.probability, 2) for item in findings] == [0.99, 0.73, 0.12]
    assert band_values(findings) == [value for value, _ in BANDS.values()]
