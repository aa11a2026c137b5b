import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import srread
from test_volume import write_nifti

from deepem.cli import main
from deepem.tables import write_annotations

SHIPPED = Path(__file__).parent.parent / "apps/deepem_app/model/pretrained_nodule_detection.pt"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms")
    assert main(["phantom", "--out", str(out), "--count", "2", "--seed", "4"]) == 0
    return out


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_phantom_writes_images_labels_and_truth(phantoms):
    assert len(list(phantoms.glob("*.nii.gz"))) == 2
    assert rows(phantoms / "annotations.csv")[0] == [
        "seriesuid", "coordX", "coordY", "coordZ", "diameter_mm",
    ]  # fmt: skip
    assert rows(phantoms / "weak_labels.csv")[0][:3] == ["seriesuid", "lobe", "slice_number"]
    truth = json.loads((phantoms / "truth.json").read_text())
    assert {row[0] for row in rows(phantoms / "series.csv")[1:]} == {
        scan["seriesuid"] for scan in truth["scans"]
    }


def test_detect_and_evaluate_go_on_past_bad_scans_and_name_them(phantoms, tmp_path, capsys):
    good = sorted(phantoms.glob("*.nii.gz"))
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    found = tmp_path / "found.csv"
    pictures = tmp_path / "pictures"
    arguments = [
        "detect",
        "--model",
        str(SHIPPED),
        "--out",
        str(found),
        "--pictures",
        str(pictures),
    ]
    images = [str(path) for path in (bad, *good, good[0], tmp_path / "none")]
    assert main([*arguments, *images]) == 1
    told = capsys.readouterr()
    assert f"not used: {bad}: file: expected a readable NIfTI" in told.err
    assert "series UID: expected one that is not used yet" in told.err
    assert f"not used: {tmp_path / 'none'}: image: expected an existing file" in told.err
    table = rows(found)
    assert table[0] == ["seriesuid", "coordX", "coordY", "coordZ", "probability", "diameter_mm"]
    series = {row[0] for row in table[1:]}
    assert series == {path.name.removesuffix(".nii.gz") for path in good}
    assert {path.stem for path in pictures.glob("*.png")} == series

    report, plot = tmp_path / "froc.json", tmp_path / "froc.png"
    annotations = phantoms / "annotations.csv"
    arguments = ["--annotations", str(annotations), "--predictions", str(found)]
    assert main(["evaluate", *arguments, "--json", str(report), "--plot", str(plot)]) == 0
    content = json.loads(report.read_text())
    assert content["nodules"] == len(rows(annotations)) - 1 and content["scans"] == 2
    assert {"fp_per_scan", "sensitivity", "cpm", "true_positives", "false_positives"} <= set(
        content
    )
    assert plot.stat().st_size > 1000


def test_detect_reports_dicom_series_as_sr_and_says_that_files_have_none(
    phantoms, tmp_path, capsys
):
    dicom, found, reports = tmp_path / "dicom", tmp_path / "found.csv", tmp_path / "sr"
    assert main(["phantom", "--out", str(dicom), "--count", "1", "--seed", "8", "--dicom"]) == 0
    (uid,) = (row[0] for row in rows(dicom / "series.csv")[1:])
    file = sorted(phantoms.glob("*.nii.gz"))[0]
    arguments = ["detect", "--model", str(SHIPPED), "--out", str(found), "--sr", str(reports)]
    arguments += ["--sr-score", "0.1", str(dicom / uid), str(file)]
    assert main(arguments) == 1
    assert f"not used: {file}: --sr: expected a DICOM series" in capsys.readouterr().err
    assert [path.name for path in reports.iterdir()] == [f"{uid}.dcm"]
    table = [[float(value) for value in row[1:]] for row in rows(found)[1:] if row[0] == uid]
    sure = [row for row in table if row[3] >= 0.1]
    assert 0 < len(sure) < len(table)
    groups = srread(str(reports / f"{uid}.dcm")).content.get_volumetric_roi_measurement_groups()
    for group, (x, y, z, probability, diameter) in zip(groups, sure, strict=True):
        surface = np.reshape(group.roi.graphic_data, (6, 3))
        assert surface.mean(0) == pytest.approx([x, y, z], abs=1e-3)
        values = [measurement.value for measurement in group.get_measurements()]
        assert values == pytest.approx([diameter, 100 * probability], abs=1e-3)
    assert file.name.removesuffix(".nii.gz") in {row[0] for row in rows(found)}  # still detected


def test_train_on_records_alone_starts_from_a_model_and_leaves_a_report(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "model"
    assert main(["phantom", "--out", str(data), "--count", "3", "--seed", "77"]) == 0
    with open(data / "weak_labels.csv", "a") as file:
        file.write("missing,RUL,,,,,,\nmissing,moon,,,,,,\n")
    records = ["--weak-labels", str(data / "weak_labels.csv"), "--method", "map", "--rounds", "1"]
    arguments = ["train", "--studies", str(data), "--out", str(out), "--init", str(SHIPPED)]
    assert main([*arguments, *records, "--steps", "2"]) == 1
    told = capsys.readouterr()
    assert "lobe: expected one of RUL" in told.err and "seriesuid: expected a scan" in told.err
    assert "the records of 1 validation scans" in told.out
    history = json.loads((out / "training.json").read_text())["history"]
    assert [entry.get("em", {}).get("round") for entry in history] == [None, 1]  # start, round
    assert "<html" in (out / "report.html").read_text()
    # Without the records there is nothing to train on.
    assert main([*arguments, "--steps", "2"]) == 2
    none = [*records[:2], "--method", "none"]
    assert main([*arguments, *none, "--steps", "2"]) == 2
    assert "nodules in scans of at least 2 patients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect", "--model", "none.pt", "--out", "x.csv", "."], "none.pt: model: expected"),
        (["train", "--studies", ".", "--annotations", "none.csv", "--out", "m"], "none.csv: "),
        (
            ["train", "--studies", ".", "--annotations", "empty.csv", "--out", "m"],
            "labels: expected",
        ),
        (
            ["evaluate", "--annotations", "odd.csv", "--predictions", "odd.csv", "--json", "j"],
            "odd.csv: header: expected the columns",
        ),
        (
            ["detect", "--model", str(SHIPPED), "--device", "tpu", "--out", "x", "."],
            "device: expected",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_annotations("empty.csv", {})
    Path("odd.csv").write_text("a,b\n1,2\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"deepem {arguments[0]}: ") and message in error[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"empty.csv", "odd.csv"}


def test_argparse_agrees_on_exit_code_2():
    for arguments in ([], ["detect"], ["phantom", "--out", "x", "--count", "0"], ["dance"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize("command", ["phantom", "train", "detect", "evaluate"])
def test_every_command_has_help_seed_and_device(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--seed" in text and "--device" in text


def test_a_training_killed_for_real_is_taken_up_again(easy_studies, tmp_path):
    """SIGKILL in the middle of ``deepem train``; the second call goes on and publishes."""
    studies = easy_studies[0].study.path.parent
    labels = tmp_path / "annotations.csv"
    write_annotations(labels, {item.study.series_uid: item.nodules for item in easy_studies})
    command = [sys.executable, "-m", "deepem", "train", "--studies", str(studies), "--annotations"]
    command += [str(labels), "--out", str(tmp_path / "m"), "--steps", "16", "--device", "cpu"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "m" / "checkpoint.pt"
    end = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    assert first.returncode == -signal.SIGKILL and checkpoint.exists()
    assert not (tmp_path / "m" / "model.pt").exists()
    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    assert "going on from step" in second.stderr
    assert (tmp_path / "m" / "training.png").exists()
    assert not checkpoint.exists()


def test_scans_without_a_file_are_told_apart_from_labels_without_a_scan(
    tmp_path, rng, capsys, easy_studies
):
    studies = tmp_path / "studies"
    studies.mkdir()
    for item in easy_studies[:2]:
        (studies / item.study.path.name).symlink_to(item.study.path)
    write_nifti(studies / "unlabelled.nii.gz", rng.integers(-1000, 0, (20, 20, 20)).astype("int16"))
    labels = {item.study.series_uid: item.nodules for item in easy_studies[:3]}
    write_annotations(tmp_path / "a.csv", labels)
    arguments = ["train", "--studies", str(studies), "--annotations", str(tmp_path / "a.csv")]
    assert main([*arguments, "--out", str(tmp_path / "m"), "--steps", "2"]) == 1
    error = capsys.readouterr().err
    assert "not used: labels: seriesuid: expected a scan in" in error and "easy2" in error
    assert "1 scans without labels are left out" in error
