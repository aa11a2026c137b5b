import re
import tarfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from series import AFFINE_LPS_MM, write_dicom

from deepem.errors import InputError
from deepem.geometry import RAS_TO_LPS
from deepem.volume import find_studies, read_volume, resample

SHAPE = (10, 20, 30)  # no two alike: swapped axes show


@pytest.fixture
def hu(rng):
    return rng.integers(-1000, 400, SHAPE).astype(np.int16)


def write_nifti(path, hu, affine_lps_mm=AFFINE_LPS_MM):
    nib.save(nib.Nifti1Image(hu, RAS_TO_LPS @ affine_lps_mm), path)
    return path


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.mhd", "a.nrrd", "dicom"])
def test_all_formats_give_the_same_voxels_in_the_same_place(tmp_path, hu, name):
    path = tmp_path / name
    if name == "dicom":
        uid = write_dicom(path, hu)
    elif ".nii" in name:
        uid = "a"
        write_nifti(path, hu)
    else:
        uid = "a"
        image = sitk.GetImageFromArray(hu.transpose(2, 1, 0))
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((-100, -90, -300))
        sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.int16
    np.testing.assert_allclose(volume.grid.affine_lps_mm, AFFINE_LPS_MM, atol=1e-5)
    assert volume.series_uid == uid


def test_a_tilted_gantry_is_kept_as_a_sheared_grid(tmp_path, hu):
    tilted = AFFINE_LPS_MM.copy()
    tilted[1, 2] = 0.6
    write_dicom(tmp_path / "tilted", hu, tilted)
    np.testing.assert_allclose(
        read_volume(tmp_path / "tilted").grid.affine_lps_mm, tilted, atol=1e-5
    )


def test_real_slopes_and_a_trailing_axis_are_fine(tmp_path, hu):
    volume = read_volume(
        write_nifti(tmp_path / "a.nii.gz", hu[..., None].astype(np.float32) + 0.25)
    )
    assert volume.hu.dtype == np.float32
    np.testing.assert_array_equal(volume.hu, hu + np.float32(0.25))


def bad_files():
    base = np.zeros(SHAPE, np.float32) - 800
    base[2] = 40
    nan = base.copy()
    nan[1, 2, 3] = np.nan
    thick = np.diag([0.7, 0.7, 10.0, 1])
    return {
        "flat": (
            base[:, :, :1],
            AFFINE_LPS_MM,
            r"shape: expected at least 2 voxels.*\(10, 20, 1\)",
        ),
        "plane": (base[:, :, 0], AFFINE_LPS_MM, r"dimensions: expected 3.*\(10, 20\)"),
        "movie": (np.stack([base] * 3, -1), AFFINE_LPS_MM, r"dimensions: expected 3"),
        "nan": (nan, AFFINE_LPS_MM, "voxels: expected finite HU, got 1 NaN"),
        "constant": (base * 0 - 1000, AFFINE_LPS_MM, "same value -1000 everywhere"),
        "not_hu": (base + 900, AFFINE_LPS_MM, "HU with air below -200, got values 100 to 940"),
        "thick": (base, thick, "voxel spacing: expected at most 8 mm, got 10 mm"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_what_is_no_chest_ct_is_refused_with_file_field_expected_and_got(tmp_path, name):
    voxels, affine, message = bad_files()[name]
    path = write_nifti(tmp_path / f"{name}.nii.gz", voxels, affine)
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("content", ["empty", "noise", "cut"])
def test_a_corrupt_file_is_one_clear_error(tmp_path, hu, name, content):
    path = tmp_path / name
    if content == "empty":
        path.touch()
    elif content == "noise":
        path.write_bytes(b"no image at all" * 50)
    else:
        if ".nii" in name:
            write_nifti(path, hu)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(hu), str(path))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="expected a readable"):
        read_volume(path)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(InputError, match="an existing file or folder, got nothing there"):
        read_volume(tmp_path / "none.nii")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a DICOM folder or one of .*, got a\.txt"):
        read_volume(tmp_path / "a.txt")
    with pytest.raises(InputError, match="a CT among its 1 files, got none"):
        read_volume(tmp_path)


def test_several_series_are_listed_and_chosen_by_uid(tmp_path, hu):
    first = write_dicom(tmp_path / "d", hu)
    second = write_dicom(tmp_path / "d", hu[:, :, :12])
    listing = "; ".join(sorted([f"{first} (30 files)", f"{second} (12 files)"]))
    with pytest.raises(InputError, match=re.escape(listing)):
        read_volume(tmp_path / "d")
    assert read_volume(tmp_path / "d", second).hu.shape == (10, 20, 12)
    with pytest.raises(InputError, match=r"series UID: expected one of .* got 9\.9"):
        read_volume(tmp_path / "d", "9.9")
    assert [study.series_uid for study in find_studies(tmp_path)] == sorted([first, second])


def test_missing_slices_other_modalities_and_odd_sizes(tmp_path, hu):
    write_dicom(tmp_path / "gap", hu)
    sorted((tmp_path / "gap").iterdir())[11].unlink()
    with pytest.raises(InputError, match=r"a slice every 2\.500 mm, got 5\.000 mm after"):
        read_volume(tmp_path / "gap")
    write_dicom(tmp_path / "mr", hu, modality="MR")
    with pytest.raises(InputError, match=r"got other modalities: .* \(MR\)"):
        read_volume(tmp_path / "mr")
    uid = write_dicom(tmp_path / "mixed", hu)
    write_dicom(tmp_path / "mixed", hu[:9])
    for file in (tmp_path / "mixed").iterdir():
        header = pydicom.dcmread(file)
        header.SeriesInstanceUID = uid
        header.save_as(file)
    with pytest.raises(InputError, match=r"shape: expected \(20, \d+\) as in"):
        read_volume(tmp_path / "mixed")


def test_a_folder_is_searched_and_what_is_broken_in_it_is_told(tmp_path, hu):
    write_nifti(tmp_path / "b.nii.gz", hu)
    write_nifti(tmp_path / "a.nii.gz", hu)
    (tmp_path / "annotations.csv").write_text("seriesuid\n")
    (tmp_path / "labels").mkdir()
    write_nifti(tmp_path / "labels" / "a.nii.gz", hu)
    uid = write_dicom(tmp_path / "series", hu, patient="Jane")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    bad = []
    studies = find_studies(tmp_path, bad.append)
    assert [study.series_uid for study in studies] == ["a", "b", uid]
    assert [study.patient_id for study in studies] == ["a", "b", "Jane"]
    assert len(bad) == 1 and "notes" in bad[0].where
    assert find_studies(tmp_path / "a.nii.gz")[0].series_uid == "a"


def test_resampling_puts_every_voxel_where_it_was(rng):
    """On an oblique flipped grid a linear field in the world stays the same field."""
    from scipy.spatial.transform import Rotation

    from deepem.geometry import Grid
    from deepem.volume import Volume

    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [20, -35, 10], degrees=True).as_matrix()
    affine[:3, :3] = turn * [0.7, -0.8, 2.0]
    affine[:3, 3] = [30, -40, 100]
    grid = Grid(affine, (60, 50, 25))
    slope = np.array([3.0, -2.0, 5.0])
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    volume = Volume((world @ slope).astype(np.float32), grid, "a")
    middle = grid.to_world((np.array(grid.shape) - 1) / 2)
    image, out = resample(volume, middle - 8, middle + 8, 1.0)
    assert image.shape == (16, 16, 16)
    expected = out.to_world(np.moveaxis(np.indices(out.shape), 0, -1)) @ slope
    np.testing.assert_allclose(image, expected, atol=0.01)
    lowest, highest = out.extent_lps_mm()
    np.testing.assert_allclose([lowest, highest], [middle - 8, middle + 8])


def test_real_dicom_and_nifti_of_one_series_are_the_same(tmp_path, real_data):
    nifti = read_volume(real_data / "lidc_0063" / "ct.nii.gz")
    with tarfile.open(real_data / "lidc_0063" / "dicom.tar.gz") as archive:
        archive.extractall(tmp_path)
    dicom = read_volume(find_studies(tmp_path)[0].path)
    np.testing.assert_allclose(dicom.grid.affine_lps_mm, nifti.grid.affine_lps_mm, atol=1e-4)
    np.testing.assert_array_equal(dicom.hu, nifti.hu)


def test_real_meta_images_keep_their_direction(real_data):
    volume = read_volume(real_data / "lesion_sizing" / "PartSolidLesionCropped.mha")
    assert (np.diag(volume.grid.affine_lps_mm)[:2] < 0).all()
    np.testing.assert_allclose(volume.grid.spacing_mm, [0.703, 0.703, 1.25], atol=0.01)
