"""Pictures: what is where, not how it looks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Circle, Rectangle

from deepem import figures
from deepem.froc import evaluate
from deepem.geometry import Grid
from deepem.nodule import Nodule, Proposal

# Off every symmetry: right half (x < 0), front (y < 0), feet half of the box.
TARGET_LPS_MM = np.array([-9.0, -6.0, 4.0])


def grids():
    """The same box of the patient, stored straight, flipped and permuted, and oblique."""
    straight = Grid.axis_aligned(np.array([-20.0, -15.0, 0.0]), 1.0, (41, 31, 26))
    flipped = np.array([[0, -2.0, 0, 20], [0, 0, -1, 15], [1.5, 0, 0, 0], [0, 0, 0, 1]])
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    shift = np.eye(4)
    shift[:3, 3] = [-30, -30, 0]
    return {
        "straight": straight,
        "flipped and permuted": Grid(flipped, (18, 21, 31)),
        "oblique": Grid(turn @ shift, (61, 61, 26)),
    }


def ball(grid: Grid) -> np.ndarray:
    """Air with a bright ball, 6 mm wide, at the target."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    distance_mm = np.linalg.norm(grid.to_world(index) - TARGET_LPS_MM, axis=-1)
    return np.where(distance_mm < 3, 0, -1000).astype(np.int16)


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figure that would be saved, so that a test can look at its parts."""
    kept = SimpleNamespace(figure=None)
    save = figures._save

    def spy(figure, path):
        kept.figure = figure
        save(figure, path)

    monkeypatch.setattr(figures, "_save", spy)
    return kept


def brightest(axes) -> np.ndarray:
    """Where the bright ball is seen, as a share of the width and height from the top left."""
    pixels = np.asarray(axes.images[0].get_array())
    rows, columns = np.nonzero(pixels > -500)
    return np.array(
        [(columns.mean() + 0.5) / pixels.shape[1], (rows.mean() + 0.5) / pixels.shape[0]]
    )


@pytest.mark.parametrize("name", grids())
def test_planes_are_radiological_for_any_orientation(name, drawn, tmp_path):
    grid = grids()[name]
    low, high = grid.extent_lps_mm()
    figures.slice_with_boxes(ball(grid), grid, [], [], tmp_path / "a.png", TARGET_LPS_MM)
    x, y, z = (TARGET_LPS_MM - low) / (high - low)
    axial, coronal, sagittal = drawn.figure.axes
    # x to the right of the picture (patient's right on the left), y down, z up.
    np.testing.assert_allclose(brightest(axial), [x, y], atol=0.02)
    np.testing.assert_allclose(brightest(coronal), [x, 1 - z], atol=0.03)
    np.testing.assert_allclose(brightest(sagittal), [y, 1 - z], atol=0.03)


def test_boxes_and_circles_lie_where_the_plane_cuts_them(drawn, tmp_path):
    grid = grids()["straight"]
    off_plane = Nodule(tuple(TARGET_LPS_MM + [0, 0, 3]), 10)  # cut 3 mm off its centre: radius 4
    far = Nodule(tuple(TARGET_LPS_MM + [0, 0, 9]), 10)
    proposals = [Proposal(Nodule(tuple(TARGET_LPS_MM), 6), 0.0), Proposal(far, 2.0)]
    figures.slice_with_boxes(
        ball(grid), grid, proposals, [off_plane, far], tmp_path / "a.png", TARGET_LPS_MM
    )
    axial = drawn.figure.axes[0]
    (box,) = [patch for patch in axial.patches if isinstance(patch, Rectangle)]
    (circle,) = [patch for patch in axial.patches if isinstance(patch, Circle)]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (-12, -9, 6, 6)
    assert circle.center == (-9, -6) and circle.radius == pytest.approx(4)
    assert [text.get_text() for text in axial.texts] == ["0.50", "R", "L", "A", "P"]
    assert [text.get_text() for text in drawn.figure.axes[1].texts][-4:] == ["R", "L", "S", "I"]


def test_close_ups_show_nodules_then_the_best_unexplained_proposals(drawn, tmp_path):
    grid = grids()["straight"]
    nodule = Nodule(tuple(TARGET_LPS_MM), 6)
    proposals = [
        Proposal(Nodule((5, 5, 5), 4), -1.0),
        Proposal(nodule, 3.0),
        Proposal(Nodule((9, 9, 9), 4), 1.0),
    ]
    path = tmp_path / "new" / "a.png"
    figures.slice_with_boxes(ball(grid), grid, proposals, [nodule], path, title="scan")
    titles = [axes.get_title() for axes in drawn.figure.axes]
    assert titles == [
        "nodule 1, 6.0 mm, z = 4.0",
        "proposal 0.73, 4.0 mm, z = 9.0",
        "proposal 0.27, 4.0 mm, z = 5.0",
    ]
    np.testing.assert_allclose(brightest(drawn.figure.axes[0]), [0.5, 0.5], atol=0.01)
    assert imread(path).std() > 0.05


def test_an_empty_scan_is_shown_through_its_middle(drawn, tmp_path):
    grid = grids()["straight"]
    figures.slice_with_boxes(ball(grid), grid, [], [], tmp_path / "a.png")
    assert drawn.figure.axes[0].get_title() == "axial, z = 12.5 mm"


def test_array_and_grid_must_agree(tmp_path):
    grid = grids()["straight"]
    with pytest.raises(ValueError, match=r"expected the shape of the grid, \(41, 31, 26\), got"):
        figures.slice_with_boxes(ball(grid)[1:], grid, [], [], tmp_path / "a.png")


def test_froc_plot_shows_the_curve_that_was_measured(drawn, tmp_path):
    near, far = Nodule((0, 0, 0), 10), Nodule((90, 0, 0), 10)
    froc = evaluate({"a": [near]}, {"a": [Proposal(far, 2), Proposal(near, 1)]}, ["a", "b"])
    clean = evaluate({}, {"a": [Proposal(far, 2)]}, ["a"])
    figures.froc_plot({"ours": froc, "clean": clean}, tmp_path / "froc.png")
    (axes,) = drawn.figure.axes
    line, dots = axes.lines[:2]
    np.testing.assert_allclose(dots.get_ydata(), froc.sensitivity)
    np.testing.assert_allclose(line.get_ydata()[line.get_xdata() < 0.5], 0)
    np.testing.assert_allclose(line.get_ydata()[line.get_xdata() > 0.5], 1)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"ours: CPM {froc.cpm:.3f}", "clean: no nodules"]
    assert axes.get_xscale() == "log"
    assert axes.get_xticklabels()[0].get_text() == "1/8"


def test_training_plot_averages_seeds_where_all_of_them_measured(drawn, tmp_path):
    runs = {"em": [[(0, 0.2), (100, 0.4), (200, 0.9)], [(100, 0.6), (0, 0.0)]], "none": []}
    figures.training_plot(runs, tmp_path / "t.png")
    (axes,) = drawn.figure.axes
    mean = axes.lines[2]
    np.testing.assert_allclose(mean.get_xdata(), [0, 100])
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.5])
    (legend,) = drawn.figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["em (2 seeds, last 0.500)", "none (0 seeds)"]


def test_the_legend_of_training_curves_never_covers_them(drawn, tmp_path):
    """Curves may run anywhere in the axes, so it stands outside, and still in the picture."""
    runs = {f"strategy number {at}": [[(0, 0.1), (100, 0.1)]] for at in range(8)}
    figures.training_plot(runs, tmp_path / "t.png")
    (axes,), (legend,) = drawn.figure.axes, drawn.figure.legends
    place = legend.get_window_extent()
    assert not place.overlaps(axes.get_tightbbox())
    assert drawn.figure.bbox.x0 <= place.x0 and place.x1 <= drawn.figure.bbox.x1
    assert drawn.figure.bbox.y0 <= place.y0


def test_every_panel_of_a_study_shows_all_of_its_points(drawn, tmp_path):
    """The scale is shared, whichever panel has the lowest and the highest."""
    curves = {
        "lobes": {0.0: (0.2, None, None), 0.4: (0.1, None, None)},
        "slices": {0.0: (0.2, 0.1, 0.3), 10.0: (-0.1, -0.3, 0.1)},
    }
    figures.curves_with_intervals(curves, "gain", tmp_path / "c.png")
    first, second = drawn.figure.axes
    assert first.get_ylim() == second.get_ylim()
    low, high = second.get_ylim()
    assert low < -0.3 and high > 0.3


def test_a_real_ct_looks_the_same_however_it_is_stored(real_data, tmp_path):
    nib = pytest.importorskip("nibabel")
    image = nib.load(real_data / "lidc_0063/ct.nii.gz")
    hu = np.asarray(image.dataobj, dtype=np.int16)
    affine = np.diag([-1.0, -1, 1, 1]) @ image.affine
    stored = Grid(affine, hu.shape)
    other = np.zeros((4, 4))  # index of (k reversed, i, j) -> index (i, j, k)
    other[[0, 1, 2, 2, 3], [1, 2, 0, 3, 3]] = [1, 1, -1, hu.shape[2] - 1, 1]
    turned_hu = hu.transpose(2, 0, 1)[::-1]
    turned = Grid(affine @ other, turned_hu.shape)
    center = np.array([-45.80479316, 59.89230782, -200.9927893])
    figures.slice_with_boxes(hu, stored, [], [], tmp_path / "a.png", center)
    figures.slice_with_boxes(turned_hu, turned, [], [], tmp_path / "b.png", center)
    np.testing.assert_array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))
