import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_volume import write_nifti

from deepem.errors import InputError
from deepem.geometry import Grid
from deepem.lungs import find_lungs
from deepem.phantom import make_phantom
from deepem.scan import ScanCache, prepare
from deepem.volume import Study, Volume, resample


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(3)


@pytest.fixture(scope="module")
def volume(phantom):
    return Volume(phantom.hu, phantom.grid, "phantom")


def regridded(volume, turn_degrees, spacing_mm, fill=-1000):
    """The same patient on a grid that is turned (columns may be mirrored) and anisotropic."""
    lowest, highest = volume.grid.extent_lps_mm()
    size_mm = (highest - lowest) * 1.2
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", turn_degrees, degrees=True).as_matrix()
    affine[:3, :3] = turn * spacing_mm
    shape = tuple(int(n) for n in np.ceil(size_mm / np.abs(spacing_mm)))
    half = affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[:3, 3] = (lowest + highest) / 2 - half
    grid = Grid(affine, shape)
    from scipy.ndimage import map_coordinates

    world = grid.to_world(np.moveaxis(np.indices(shape), 0, -1))
    index = np.moveaxis(volume.grid.to_index(world), -1, 0)
    hu = map_coordinates(volume.hu.astype(np.float32), index, order=1, cval=fill)
    return Volume(hu.astype(np.int16), grid, "regridded")


@pytest.mark.parametrize(
    ("turn_degrees", "spacing_mm"),
    [
        ((0, 0, 0), (0.8, 0.8, 2.5)),
        ((0, 0, 0), (-0.9, -0.9, 3.0)),
        ((12, -18, 7), (0.9, 0.9, 2.0)),
        ((0, 0, 0), (1.0, 1.0, 8.0)),
        ((90, 0, 0), (1.0, -1.0, 1.5)),
    ],
    ids=["anisotropic", "flipped", "oblique", "8 mm slices", "coronal"],
)
@pytest.mark.parametrize("fill", [-1000, -3024])
def test_a_patient_looks_the_same_on_every_grid(volume, turn_degrees, spacing_mm, fill):
    reference = prepare(volume)
    scan = prepare(regridded(volume, turn_degrees, spacing_mm, fill))
    assert scan.lungs.found and scan.image.dtype == np.uint8
    np.testing.assert_allclose(scan.grid.affine_lps_mm[:3, :3], np.eye(3))
    tolerance_mm = 12  # the recesses below the domes are thinner than thick slices
    for corner in ("lowest_lps_mm", "highest_lps_mm"):
        np.testing.assert_allclose(
            getattr(scan.lungs, corner), getattr(reference.lungs, corner), atol=tolerance_mm
        )
    # The same world points show the same tissue, whatever grid they came from.
    rng = np.random.default_rng(0)
    inside = rng.uniform(reference.lungs.lowest_lps_mm, reference.lungs.highest_lps_mm, (4000, 3))
    seen = [
        one.image[
            tuple(
                np.rint(one.grid.to_index(inside))
                .astype(int)
                .clip(0, np.array(one.image.shape) - 1)
                .T
            )
        ]
        for one in (reference, scan)
    ]
    assert np.corrcoef(*[values.astype(float) for values in seen])[0, 1] > 0.85


def test_the_window_maps_hu_to_bytes():
    hu = np.full((40, 40, 40), -1200, np.int16)
    hu[20:] = 600
    hu[:, :20] = 5000
    hu[:, 30:] = -3024
    hu[10:15, 20:30] = -300
    scan = prepare(Volume(hu, Grid(np.eye(4), hu.shape), "a"))
    assert not scan.lungs.found and scan.image.shape == hu.shape  # nothing lung-like: everything
    at = np.array([(2, 25, 5), (30, 25, 5), (2, 5, 5), (2, 35, 5), (12, 25, 5)])
    assert scan.image[tuple(at.T)].tolist() == [0, 255, 255, 0, 128]


def test_lungs_are_found_where_they_are(phantom, volume):
    lungs = find_lungs(volume)
    assert lungs.found
    index = np.argwhere(phantom.lobes > 0)
    truth = phantom.grid.to_world(index)
    np.testing.assert_allclose(lungs.lowest_lps_mm, truth.min(0), atol=12)
    np.testing.assert_allclose(lungs.highest_lps_mm, truth.max(0), atol=12)
    assert (lungs.distance_mm(truth[::997]) <= 6).mean() > 0.98
    outside = phantom.grid.to_world(np.argwhere(phantom.lobes == 0))
    far = outside[::997]
    assert (lungs.distance_mm(far) > 0).mean() > 0.85
    corners = np.stack([lungs.lowest_lps_mm, lungs.highest_lps_mm])
    np.testing.assert_allclose(lungs.relative(corners), [[0, 0, 0], [1, 1, 1]], atol=1e-9)


def test_nodules_stay_within_reach_of_the_lungs():
    """What `propose` drops as chest wall must not be a nodule."""
    for seed in range(20, 28):
        phantom = make_phantom(seed, nodule_count=3)
        lungs = find_lungs(Volume(phantom.hu, phantom.grid, "a"))
        centers = np.array([item.nodule.center_lps_mm for item in phantom.nodules])
        assert lungs.found and (lungs.distance_mm(centers) <= 10).all()


def test_the_cache_reads_a_scan_once_and_notices_a_new_file(tmp_path, phantom, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz", phantom.hu, phantom.grid.affine_lps_mm)
    study = Study("a", path, "a")
    cache = ScanCache(tmp_path / "cache")
    first = cache.get(study)
    monkeypatch.setattr("deepem.scan.read_volume", lambda *_: pytest.fail("read again"))
    again = cache.get(study)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.grid.affine_lps_mm, again.grid.affine_lps_mm)
    np.testing.assert_array_equal(first.lungs.mask, again.lungs.mask)
    assert again.lungs.found
    monkeypatch.undo()
    path.write_bytes(b"corrupt")
    with pytest.raises(InputError, match="a readable NIfTI"):
        cache.get(study)
    path.unlink()
    with pytest.raises(InputError, match="a readable file"):
        cache.get(study)


def test_the_resampled_volume_outside_is_air(volume):
    lowest, _ = volume.grid.extent_lps_mm()
    image, _ = resample(volume, lowest - 10, lowest - 2, 1.0)
    assert (image == -1000).all()
