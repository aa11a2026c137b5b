"""Settings of the app and of its requests: text from outside becomes types here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepem.em import METHODS, EmConfig
from deepem.errors import InputError
from deepem.ranking.strategies import DEFAULT, STRATEGIES

DEVICES = ("auto", "cpu", "cuda")
EM_METHODS = ("none", *METHODS)

_OF_MONAI_LABEL = ("server_mode", "auth_token")
"""Keys that MONAI Label reads itself, or that its apps are commonly started with."""


@dataclass(frozen=True)
class AppConf:
    """``--conf`` of this app. The README says what each key does."""

    models: str = "all"
    use_pretrained_model: bool = True
    preload: bool = False
    score_threshold: float = 0.5
    device: str = "auto"
    skip_trainers: bool = False
    skip_strategies: bool = False
    skip_scoring: bool = False
    strategy: str = DEFAULT
    lease_minutes: float = 60.0
    records: str = ""
    em_method: str = EmConfig.method
    train_steps: int = 4000
    train_minutes: float = 0.0

    def __post_init__(self) -> None:
        probability(vars(self), "score_threshold", self.score_threshold)
        one_of(vars(self), "device", DEVICES)
        one_of(vars(self), "em_method", EM_METHODS)
        one_of(vars(self), "strategy", tuple(STRATEGIES))
        if self.records and not Path(self.records).exists():
            raise InputError("settings", "records", "an existing file or folder", self.records)

    @classmethod
    def parse(cls, conf: Mapping[str, Any]) -> AppConf:
        """From ``--conf`` keys and values; InputError for an unknown key or a bad value."""
        defaults = {field.name: field.default for field in fields(cls)}
        unknown = sorted(conf.keys() - defaults.keys() - set(_OF_MONAI_LABEL))
        if unknown:
            raise InputError("--conf", "key", f"one of {sorted(defaults)}", ", ".join(unknown))
        parsers: dict[type, Callable[[Mapping[str, Any], str, Any], Any]]
        parsers = {bool: boolean, int: whole, float: number, str: text}
        return cls(**{
            key: parsers[type(default)](conf, key, default) for key, default in defaults.items()
        })  # fmt: skip


def text(settings: Mapping[str, Any], key: str, default: str) -> str:
    """The setting ``key``; of a list of choices, as a client may send it, the first."""
    value = settings.get(key, default)
    return str(value[0] if isinstance(value, (list, tuple)) and value else value).strip()


def one_of(settings: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    """The setting, by default the first of ``choices``; InputError when it is none of them."""
    value = text(settings, key, choices[0])
    if value not in choices:
        raise InputError("settings", key, f"one of {', '.join(choices)}", value)
    return value


def boolean(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    """The setting as true or false; InputError for anything else."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    value = text(settings, key, str(default)).lower()
    if value not in values:
        raise InputError("settings", key, "true or false", value)
    return values[value]


def number(settings: Mapping[str, Any], key: str, default: float) -> float:
    """The setting as a number, 0 or more; InputError for anything else."""
    value = text(settings, key, str(default))
    try:
        parsed = float(value)
    except ValueError as error:
        raise InputError("settings", key, "a number", value) from error
    if not 0 <= parsed < float("inf"):
        raise InputError("settings", key, "a number, 0 or more", value)
    return parsed


def whole(settings: Mapping[str, Any], key: str, default: int) -> int:
    """The setting as a whole number, 0 or more; InputError for anything else."""
    parsed = number(settings, key, default)
    if parsed != int(parsed):
        raise InputError("settings", key, "a whole number", parsed)
    return int(parsed)


def probability(settings: Mapping[str, Any], key: str, default: float) -> float:
    """The setting as a number in 0..1; InputError for anything else."""
    parsed = number(settings, key, default)
    if parsed > 1:
        raise InputError("settings", key, "a number in 0..1", parsed)
    return parsed
