"""The 3D network: a residual encoder-decoder with skip connections and one output level.

One class serves both presets. ``paper`` follows the "3D Res18" of Zhu et al. (DeepEM, MICCAI 2018;
DeepLung, WACV 2018); ``slim`` keeps the shape and halves the resolution before the first residual
block, which is what makes it usable on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

OUTPUT_STRIDE = 4
"""Voxels between neighbouring output cells, for every preset."""

VALUES_PER_ANCHOR = 5
"""logit, dx, dy, dz (in anchor edges), log(diameter / anchor edge)."""


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network.

    widths, blocks: channels and residual blocks at strides 2, 4, 8 and 16.
    coordinates: three more input channels that say where in the lungs the patch lies.
    anchors_mm: edges of the cubic anchors at every output cell.
    """

    stem_stride: int
    stem_width: int
    widths: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    decoder_width: int
    head_width: int
    coordinates: bool
    anchors_mm: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {self.stem_stride}")
        if not self.anchors_mm or min(self.anchors_mm) <= 0:
            raise ValueError(f"anchors_mm must be positive edge lengths, got {self.anchors_mm}")


PRESETS = {
    "slim": NetworkConfig(
        stem_stride=2,
        stem_width=16,
        widths=(16, 32, 48, 64),
        blocks=(1, 2, 2, 2),
        decoder_width=64,
        head_width=64,
        coordinates=False,
        anchors_mm=(4.0, 6.0, 10.0, 16.0, 24.0),
    ),
    "paper": NetworkConfig(
        stem_stride=1,
        stem_width=24,
        widths=(32, 64, 64, 64),
        blocks=(2, 2, 3, 3),
        decoder_width=64,
        head_width=64,
        coordinates=True,
        anchors_mm=(5.0, 10.0, 20.0),
    ),
}


class ConvNorm(nn.Module):
    """Convolution and batch norm as one unit, so that `fused` can fold the two for inference."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm: nn.BatchNorm3d | nn.Identity = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, I, J, K) -> (B, outputs, I / stride, J / stride, K / stride)."""
        return self.norm(self.conv(x))

    def fold(self) -> None:
        """Make one convolution of the two, with the running statistics, in place."""
        if isinstance(self.norm, nn.BatchNorm3d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class Residual(nn.Module):
    """Two 3x3x3 convolutions around an identity; the first may reduce the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, I, J, K) -> (B, outputs, I / stride, J / stride, K / stride)."""
        out = self.second(torch.relu_(self.first(x)))
        return torch.relu_(out + self.shortcut(x))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = Residual(inputs, outputs, stride)
    return nn.Sequential(first, *(Residual(outputs, outputs) for _ in range(blocks - 1)))


class NoduleNet(nn.Module):
    """Proposal maps of a batch of patches.

    Input: (B, C, I, J, K) at 1 mm, edges divisible by 16. Channel 0 holds intensities in 0..1;
    with ``config.coordinates`` channels 1..3 hold positions relative to the lung bounding box.
    Output: (B, A * 5, I/4, J/4, K/4) float32: for every anchor logit, dx, dy, dz, log(d / anchor).
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        at2, at4, at8, at16 = config.widths
        up = config.decoder_width
        self.stem = nn.Sequential(
            ConvNorm(1, config.stem_width, 3, config.stem_stride), nn.ReLU(inplace=True)
        )
        self.stage2 = _stage(config.stem_width, at2, config.blocks[0], 2 // config.stem_stride)
        self.stage4 = _stage(at2, at4, config.blocks[1], 2)
        self.stage8 = _stage(at4, at8, config.blocks[2], 2)
        self.stage16 = _stage(at8, at16, config.blocks[3], 2)
        self.up8 = nn.ConvTranspose3d(at16, up, 2, 2)
        self.merge8 = Residual(up + at8, up)
        self.up4 = nn.ConvTranspose3d(up, up, 2, 2)
        self.merge4 = Residual(up + at4 + (3 if config.coordinates else 0), up)
        anchors = len(config.anchors_mm)
        last = nn.Conv3d(config.head_width, anchors * VALUES_PER_ANCHOR, 1)
        self.head = nn.Sequential(nn.Conv3d(up, config.head_width, 1), nn.ReLU(inplace=True), last)
        # A detector that starts by saying "nodule" everywhere spends its first steps unlearning it.
        bias = torch.zeros(anchors, VALUES_PER_ANCHOR)
        bias[:, 0] = -4.0
        last.bias = nn.Parameter(bias.flatten())

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return 4 if self.config.coordinates else 1

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        at4 = self.stage4(self.stage2(self.stem(x[:, :1])))
        at8 = self.stage8(at4)
        merged8 = self.merge8(torch.cat([self.up8(self.stage16(at8)), at8], 1))
        parts = [self.up4(merged8), at4]
        if self.config.coordinates:
            parts.append(nn.functional.avg_pool3d(x[:, 1:], OUTPUT_STRIDE).to(at4.dtype))
        merged4 = self.merge4(torch.cat(parts, 1))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # bfloat16 boxes would be 2 voxels coarse
            return self.head(merged4.float())


def fused(network: NoduleNet) -> NoduleNet:
    """The same network for inference only: batch norms are folded into convolutions, in place."""
    network.eval()
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.fold()
    return network


def processor_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulated it is up to 50 times slower."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities: dict[str, Any] = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU. ValueError for a typo."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} asked for, {torch.cuda.device_count()} CUDA devices here")
    return device


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware has it, float32 elsewhere."""
    enabled = device.type == "cuda" or (device.type == "cpu" and processor_has_bfloat16())
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
