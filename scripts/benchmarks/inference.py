"""Seconds and peak memory for one chest CT on the CPU: this detector against MONAI's own.

The other side is the architecture of the model zoo's bundle `lung_nodule_ct_detection` (MONAI's
RetinaNetDetector on a ResNet-50 FPN) with the settings of its `inference.json`, random weights.
All contenders see the same volume on the same cores, one after the other, each in a process of its
own, so that its peak memory is its own.

    .venv/bin/python scripts/benchmarks/inference.py         # about 8 minutes on 2 idle cores
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median_low

# Only the children import torch: a child's peak memory would start at that of its parent.

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "apps" / "deepem_app" / "model" / "pretrained_nodule_detection.pt"

CONTENDERS = {
    "deepem-bfloat16": "DeepEM, bfloat16",
    "deepem-float32": "DeepEM, float32",
    "zoo-published": "zoo, bfloat16, one pass below 512 x 512 x 192 voxels (as published)",
    "zoo-windows": "zoo, bfloat16, windows of 192 x 192 x 80 (its training patch)",
}
DEFAULT = ["deepem-bfloat16", "deepem-float32", "zoo-windows"]
REPEATS = 3
EDGES_MM = (320, 320, 300)
FINE_MM = (0.625, 0.625, 1.0)
SPACING_MM = (0.703125, 0.703125, 1.25)
PATCHES = {"zoo-published": (512, 512, 192), "zoo-windows": (192, 192, 80)}
ANCHORS = [[6, 8, 4], [8, 6, 5], [10, 10, 6]]
SURE = 0.3
"""Probability from which on a finding must be there in both precisions."""


def main() -> None:
    """Run every contender, print the table, write `inference.json` and `inference.md`."""
    options = _parser().parse_args()
    if options.child:
        print(json.dumps(_child(options)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        volume = Path(folder) / "volume.npz"
        made = _run("volume", volume, options)
        results = {}
        for name in options.contenders:
            print(f"{CONTENDERS[name]} ...", file=sys.stderr, flush=True)
            results[name] = _run(name, volume, options)
    report = {
        "machine": {
            "processor": _processor(),
            "threads": options.threads,
            "load_before": round(load, 2),
            "python": platform.python_version(),
        },
        "volume": made,
        "contenders": results,
        "agreement": _agreement(results),
    }
    text = _markdown(report)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    for result in results.values():
        result.pop("findings", None)
    (options.out / "inference.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "inference.md").write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed and memory of detection on the CPU.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(all cores)")
    parser.add_argument("--edge-mm", type=int, help="only a cube from the middle, to try it out")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT,
                        help="(all but zoo-published)")  # fmt: skip
    parser.add_argument("--model", type=Path, default=SHIPPED, help="(the one in the app)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="(beside this script)")
    parser.add_argument("--child", choices=("volume", *CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--volume", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(child: str, volume: Path, options: argparse.Namespace) -> dict:
    """What one child process reports; only its failure if it was killed, say for its memory."""
    command = [sys.executable, __file__, "--child", child, "--volume", str(volume)]
    command += ["--threads", str(options.threads), "--model", str(options.model)]
    command += ["--edge-mm", str(options.edge_mm)] if options.edge_mm else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        if child == "volume":
            raise SystemExit("could not make the volume: see above")
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _child(options: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.child == "volume":
        return _make_volume(options.volume, options.edge_mm)
    if options.child.startswith("deepem"):
        report = _time_deepem(options.volume, options.model, options.child == "deepem-bfloat16")
    else:
        report = _time_zoo(options.volume, PATCHES[options.child])
    return {**report, "peak_gib": round(_peak_bytes() / 2**30, 2)}


def _make_volume(path: Path, edge_mm: int | None) -> dict:
    """The middle of a synthetic chest, on the grid of a thin-slice scan."""
    import numpy as np
    from scipy.ndimage import zoom

    from deepem.phantom import make_phantom

    phantom = make_phantom(0, "full")
    affine_lps_mm = phantom.grid.affine_lps_mm
    spacing_mm = np.linalg.norm(affine_lps_mm[:3, :3], axis=0)
    edges_mm = np.array([edge_mm] * 3 if edge_mm else EDGES_MM)
    size = np.minimum(np.rint(edges_mm / spacing_mm).astype(int), phantom.hu.shape)
    low = (phantom.hu.shape - size) // 2
    cropped = phantom.hu[tuple(map(slice, low, low + size))]
    ratio = np.rint(size * spacing_mm / FINE_MM) / size
    hu = zoom(cropped, ratio, order=1, mode="nearest", grid_mode=True)
    to_index = np.diag([*1 / ratio, 1])  # voxel edges stay where they are
    to_index[:3, 3] = low + 0.5 / ratio - 0.5
    np.savez(path, hu=hu, affine_lps_mm=affine_lps_mm @ to_index)
    return {
        "voxels": list(hu.shape),
        "edges_mm": [round(float(edge)) for edge in size * spacing_mm],
    }


def _load(path: Path) -> tuple:
    import numpy as np

    with np.load(path) as content:
        return content["hu"], content["affine_lps_mm"]


def _time_deepem(path: Path, model: Path, bfloat16: bool) -> dict:
    """All that the product does between the volume in memory and its findings."""
    from unittest.mock import patch

    import torch

    from deepem.detector import propose
    from deepem.geometry import Grid
    from deepem.model import load_model
    from deepem.network import PRESETS, NoduleNet, fused, processor_has_bfloat16
    from deepem.scan import prepare
    from deepem.volume import Volume

    if bfloat16 and not processor_has_bfloat16():
        return {"failed": "this processor has no bfloat16"}
    hu, affine_lps_mm = _load(path)
    volume = Volume(hu, Grid(affine_lps_mm, hu.shape), "benchmark")
    network = load_model(model)[0] if model.is_file() else NoduleNet(PRESETS["slim"]).eval()
    network = fused(network).to(memory_format=torch.channels_last_3d)
    cpu = torch.device("cpu")
    runs = []
    for _ in range(REPEATS):
        with nullcontext() if bfloat16 else patch("deepem.detector.mixed_precision", _float32):
            start = time.perf_counter()
            scan = prepare(volume)
            prepared = time.perf_counter()
            proposals = propose(network, scan, cpu)
            runs.append((prepared - start, time.perf_counter() - prepared))
    prepare_s, propose_s = runs[[sum(run) for run in runs].index(median_low(map(sum, runs)))]
    return {
        "weights": model.name if model.is_file() else "random",
        "voxels": list(scan.image.shape),
        "runs": REPEATS,
        "prepare_s": round(prepare_s, 2),
        "network_s": round(propose_s, 2),
        "counted_s": round(prepare_s + propose_s, 2),
        "boxes": len(proposals),
        "findings": [
            [*item.nodule.center_lps_mm, item.nodule.diameter_mm, item.probability]
            for item in proposals
        ],
    }


def _float32(device: object) -> AbstractContextManager:
    return nullcontext()


def _time_zoo(path: Path, patch: tuple[int, int, int]) -> dict:
    """Preparation and network of the bundle; the suppression of its boxes is timed apart."""
    import numpy as np
    import torch
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.networks.retinanet_network import (
        RetinaNet,
        resnet_fpn_feature_extractor,
    )
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
    from monai.data import MetaTensor
    from monai.networks.nets.resnet import resnet50
    from monai.transforms import Compose, Orientation, ScaleIntensityRange, Spacing

    from deepem.geometry import RAS_TO_LPS
    from deepem.network import processor_has_bfloat16

    class Detector(RetinaNetDetector):
        post_s = 0.0

        def postprocess_detections(self, *args, **kwargs):
            start = time.perf_counter()
            result = super().postprocess_detections(*args, **kwargs)
            self.post_s = time.perf_counter() - start
            return result

    backbone = resnet50(
        spatial_dims=3, n_input_channels=1, conv1_t_stride=[2, 2, 1], conv1_t_size=[7, 7, 7]
    )
    features = resnet_fpn_feature_extractor(backbone, 3, False, [1, 2], None)
    network = RetinaNet(3, 1, len(ANCHORS), features, size_divisible=[16, 16, 8])
    anchors = AnchorGeneratorWithAnchorShape([1, 2, 4], base_anchor_shapes=ANCHORS)
    detector = Detector(network, anchors, size_divisible=[16, 16, 8]).eval()
    detector.set_box_selector_parameters(
        score_thresh=0.02, topk_candidates_per_level=1000, nms_thresh=0.22, detections_per_img=300
    )
    detector.set_sliding_window_inferer(
        patch,
        overlap=0.25,
        sw_batch_size=1,
        mode="constant",
        device="cpu",
    )
    prepare = Compose(
        [
            Orientation("RAS", labels=None),
            Spacing(SPACING_MM),
            ScaleIntensityRange(-1024, 300, 0, 1, clip=True),
        ]
    )

    hu, affine_lps_mm = _load(path)
    start = time.perf_counter()
    image = prepare(MetaTensor(hu[None].astype(np.float32), affine=RAS_TO_LPS @ affine_lps_mm))
    image = image.as_tensor()
    prepared = time.perf_counter()
    windows = image[0].numel() >= np.prod(patch)  # the bundle's inferer decides like this
    amp = torch.autocast("cpu", torch.bfloat16, enabled=processor_has_bfloat16())
    with torch.no_grad(), amp:
        found = detector([image], use_inferer=bool(windows))
    network_s = time.perf_counter() - prepared - detector.post_s
    return {
        "weights": "random",
        "voxels": list(image.shape[1:]),
        "runs": 1,
        "prepare_s": round(prepared - start, 2),
        "network_s": round(network_s, 2),
        "suppression_s": round(detector.post_s, 2),
        "counted_s": round(prepared - start + network_s, 2),
        "boxes": len(found[0][detector.target_box_key]),
    }


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _agreement(results: dict[str, dict]) -> dict | None:
    """How far the sure findings of each precision are from the nearest one of the other."""
    import math

    sides = [results.get(f"deepem-{precision}", {}) for precision in ("bfloat16", "float32")]
    if any("findings" not in side or side["weights"] == "random" for side in sides):
        return None  # of random weights nothing is sure
    mine, other = (side["findings"] for side in sides)
    pairs = []
    for these, those in ((mine, other), (other, mine)):
        for one in these:
            if one[4] >= SURE:
                pairs.append((one, min(those, key=lambda it: math.dist(it[:3], one[:3]))
                              if those else None))  # fmt: skip
    paired = [(one, near) for one, near in pairs if near and math.dist(one[:3], near[:3]) <= 1.0]
    return {
        "weights": sides[0]["weights"],
        "sure_findings": [sum(it[4] >= SURE for it in side) for side in (mine, other)],
        "without_partner_within_1_mm": len(pairs) - len(paired),
        "largest_shift_mm": _largest(math.dist(a[:3], b[:3]) for a, b in paired),
        "largest_diameter_change_mm": _largest(abs(a[3] - b[3]) for a, b in paired),
        "largest_probability_change": _largest(abs(a[4] - b[4]) for a, b in paired),
    }


def _largest(values: Iterable[float]) -> float:
    return round(max(values, default=0.0), 3)


def _markdown(report: dict) -> str:
    machine, volume, results = (report[key] for key in ("machine", "volume", "contenders"))
    fastest = min((r["counted_s"] for n, r in results.items() if n.startswith("deepem")
                   and "counted_s" in r), default=None)  # fmt: skip
    lines = [
        "# One chest CT on the CPU",
        "",
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load_before']} "
        f"before the start. Synthetic volume of {_times(volume['voxels'])} voxels, "
        f"{_times(volume['edges_mm'])} mm.",
        "",
        "| contender | its voxels | prepare s | network s | counted s | x DeepEM | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {CONTENDERS[name]} | {result['failed']} | | | | | |")
            continue
        ratio = f"{result['counted_s'] / fastest:.1f}" if fastest else ""
        lines.append(
            f"| {CONTENDERS[name]} | {_times(result['voxels'])} | {result['prepare_s']:.2f} "
            f"| {result['network_s']:.2f} | {result['counted_s']:.2f} | {ratio} "
            f"| {result['peak_gib']:.2f} |"
        )
    lines += [
        "",
        "Counted for DeepEM is everything from the volume in memory to its findings: lungs, "
        f"resampling, network, suppression; median of {REPEATS} runs, its network also looks only "
        "at the lungs and their surroundings. Counted for the zoo is resampling and network, once; "
        "the suppression of its boxes is left out, because random weights say nothing about their "
        "number. Its own mixed precision works on CUDA only: bfloat16 here is a favour to it. "
        "Reading the file is left out on both sides.",
    ]
    agreement = report["agreement"]
    if agreement:
        lines += [
            "",
            f"bfloat16 against float32 (weights: {agreement['weights']}): "
            f"{agreement['sure_findings'][0]} and {agreement['sure_findings'][1]} findings with "
            f"probability >= {SURE}, {agreement['without_partner_within_1_mm']} of them without a "
            "partner within 1 mm in the other; largest shift "
            f"{agreement['largest_shift_mm']} mm, largest change of diameter "
            f"{agreement['largest_diameter_change_mm']} mm, of probability "
            f"{agreement['largest_probability_change']}.",
        ]
    return "\n".join(lines) + "\n"


def _times(values: Iterable) -> str:
    return " x ".join(map(str, values))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
