"""A published model: weights and the card that says what they are, in one file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepem.errors import InputError
from deepem.files import atomic_path, write_json
from deepem.network import NetworkConfig, NoduleNet

_FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What a model is, how it came to be, and how good it was measured to be.

    metrics: on validation scans that it never saw: ``cpm``, ``sensitivity`` at the seven rates,
    ``scans``, ``nodules``. data_fingerprint: of the images and labels that it was trained on.
    weights_fingerprint: of the weights that were measured; a file with others does not load.
    """

    network: NetworkConfig
    training: dict[str, Any]
    data: dict[str, Any]
    data_fingerprint: str
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    weights_fingerprint: str
    created_utc: str
    deepem_version: str
    intended_use: str = field(
        default="Research software. Not a medical device, not for clinical use."
    )


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Hash of all tensors with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def publish(weights: dict[str, Tensor], card: ModelCard, path: Path) -> None:
    """Swap the model at ``path`` in one step; a reader sees the old file or the new one.

    The card is also written beside it as JSON for people. ValueError if the card was measured on
    other weights.
    """
    if card.weights_fingerprint != fingerprint(weights):
        raise ValueError(f"{path.name}: the card was measured on other weights")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = {"format": _FORMAT, "model": contiguous, "card": asdict(card)}
    with atomic_path(path) as part:
        torch.save(content, part)
    write_json(path.with_suffix(".json"), asdict(card))


def load_model(path: Path) -> tuple[NoduleNet, ModelCard]:
    """The network with its weights, in evaluation mode on the CPU, and its card.

    path: a model file, or the folder that `deepem train` wrote. InputError for anything else.
    """
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(file, "model", "a published model file", "nothing there")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        values = dict(content["card"])
        card = ModelCard(network=NetworkConfig(**values.pop("network")), **values)
        weights = content["model"]
        net = NoduleNet(card.network)
        net.load_state_dict(weights)
    except Exception as error:  # unpickling rubbish can raise anything
        reason = str(error).strip().splitlines()
        raise InputError(
            file, "model", "a model that `deepem train` published", reason[0] if reason else error
        ) from error
    if fingerprint(weights) != card.weights_fingerprint:
        raise InputError(file, "weights", f"fingerprint {card.weights_fingerprint}", "others")
    return net.eval(), card
