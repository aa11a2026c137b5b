from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from deepem.geometry import RAS_TO_LPS, Grid, box_to_sphere, sphere_to_box


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Oblique, flipped, off-origin and anisotropic ones."""
    angles = draw(hnp.arrays(float, 3, elements=st.floats(-180, 180)))
    spacing_mm = draw(hnp.arrays(float, 3, elements=st.floats(0.3, 8)))
    flips = draw(hnp.arrays(float, 3, elements=st.sampled_from([-1.0, 1.0])))
    affine = np.eye(4)
    affine[:3, :3] = (
        Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing_mm * flips
    )
    affine[:3, 3] = draw(hnp.arrays(float, 3, elements=st.floats(-500, 500)))
    return Grid(affine, (10, 20, 30))


@given(grids(), hnp.arrays(float, (5, 3), elements=st.floats(-500, 500)))
def test_a_voxel_keeps_its_index_through_the_world(grid, index):
    np.testing.assert_allclose(grid.to_index(grid.to_world(index)), index, atol=1e-6)


@given(grids())
def test_the_extent_holds_every_voxel_and_touches_the_outer_edges(grid):
    lowest, highest = grid.extent_lps_mm()
    corners = grid.to_world(np.argwhere(np.ones((2, 2, 2))) * (np.array(grid.shape) - 1))
    assert (corners > lowest).all() and (corners < highest).all()
    half_mm = np.abs(grid.affine_lps_mm[:3, :3]).sum(1) / 2
    np.testing.assert_allclose(corners.min(0) - half_mm, lowest, atol=1e-6)


def test_nifti_x_points_right_so_lps_x_is_negative():
    image = SimpleNamespace(affine=np.diag([0.7, 0.7, 2.5, 1.0]), shape=(512, 512, 120))
    grid = Grid(RAS_TO_LPS @ image.affine, image.shape)
    np.testing.assert_allclose(grid.to_world(np.array([10, 20, 3])), [-7, -14, 7.5])
    np.testing.assert_allclose(grid.spacing_mm, [0.7, 0.7, 2.5])


def test_sphere_and_box():
    center, size = sphere_to_box(np.array([[1.0, 2, 3]]), np.array([8.0]))
    np.testing.assert_array_equal(center, [[1, 2, 3]])
    np.testing.assert_array_equal(size, [[8, 8, 8]])
    center, diameter = box_to_sphere(np.array([1.0, 2, 3]), np.array([6.0, 9, 12]))
    assert diameter == 9


@pytest.mark.parametrize(
    ("affine", "shape", "message"),
    [
        (np.eye(3), (2, 2, 2), r"affine_lps_mm: expected shape \(4, 4\), got \(3, 3\)"),
        (np.diag([1, 1, 0, 1]), (2, 2, 2), "finite and invertible"),
        (np.diag([1, np.nan, 1, 1]), (2, 2, 2), "finite and invertible"),
        (np.eye(4), (2, 0, 2), r"three positive sizes, got \(2, 0, 2\)"),
    ],
)
def test_what_is_no_grid_says_why(affine, shape, message):
    with pytest.raises(ValueError, match=message):
        Grid(affine, shape)
