"""What every reader of weak labels gives back, and how it reads one row of a table."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deepem.errors import InputError
from deepem.nodule import MAX_DIAMETER_MM, CleanStatement, WeakLabel
from deepem.tables import read_lines

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Records:
    """All that one source says: nodules, clean scans, and what could not be used, with its place.

    others: how many entries speak of something else than a nodule.
    """

    labels: tuple[WeakLabel, ...] = ()
    clean: tuple[CleanStatement, ...] = ()
    rejected: tuple[InputError, ...] = ()
    others: int = 0

    @property
    def series(self) -> list[str]:
        """UIDs of all series with a label or a clean statement, each once."""
        uids = [label.series_uid for label in self.labels]
        return list(dict.fromkeys([*uids, *(item.series_uid for item in self.clean)]))

    @classmethod
    def merged(cls, parts: Iterable[Records]) -> Records:
        """Everything that ``parts`` say, in their order."""
        parts = list(parts)
        return cls(
            tuple(label for part in parts for label in part.labels),
            tuple(item for part in parts for item in part.clean),
            tuple(error for part in parts for error in part.rejected),
            sum(part.others for part in parts),
        )


@dataclass(frozen=True)
class Row:
    """Fields of one table row by their column in lower case; ``where`` is its file and row."""

    where: str
    fields: Mapping[str, str]

    def text(self, name: str) -> str:
        """The field, or an empty text where it or its column is missing."""
        return self.fields.get(name, "")

    def error(self, name: str, expected: str) -> InputError:
        """The error that the field ``name`` is not what was expected."""
        return InputError(self.where, name, expected, self.text(name) or "nothing")

    def required(self, name: str, expected: str) -> str:
        """The field; InputError when it is empty."""
        if not self.text(name):
            raise self.error(name, expected)
        return self.text(name)

    def one_of(self, name: str, choices: Mapping[str, _Value], expected: str = "") -> _Value:
        """What the field means, in any case of letters; InputError when it is none of the choices.

        An empty field must be among the choices to be fine.
        """
        key = self.text(name).lower()
        if key not in choices:
            raise self.error(name, expected or f"one of {', '.join(filter(None, choices))}")
        return choices[key]

    def whole(self, name: str, lowest: int) -> int | None:
        """A whole number (``12`` or ``12.0``); None for an empty field."""
        value = self.number(name, f"a whole number from {lowest}", lowest)
        if value is None:
            return None
        if value != int(value):
            raise self.error(name, f"a whole number from {lowest}")
        return int(value)

    def number(
        self, name: str, expected: str = "a finite number", lowest: float = -math.inf
    ) -> float | None:
        """A finite number from ``lowest``; None for an empty field."""
        if not self.text(name):
            return None
        try:
            value = float(self.text(name))
        except ValueError:
            raise self.error(name, expected) from None
        if not (math.isfinite(value) and value >= lowest):
            raise self.error(name, expected)
        return value

    def diameter_mm(self, name: str) -> float | None:
        """A diameter in mm; None for an empty field."""
        value = self.number(name)
        if value is not None and not 0 < value <= MAX_DIAMETER_MM:
            raise self.error(name, f"a number of mm in (0, {MAX_DIAMETER_MM:g}]")
        return value


def read_rows(
    path: str | os.PathLike[str], columns: Sequence[str]
) -> tuple[list[Row], list[InputError]]:
    """Rows of a CSV file with at least ``columns`` (lower case here, any case there).

    Rows with more fields than the header are rejected; InputError when the file or its header
    cannot be used.
    """
    (_, header), *lines = read_lines(path)
    names = [name.lower() for name in header]
    if missing := [name for name in columns if name not in names]:
        raise InputError(path, "header", f"the columns {', '.join(missing)}", ", ".join(header))
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise InputError(path, "header", "every column once", f"{', '.join(repeated)} repeated")
    rows, rejected = [], []
    for number, fields in lines:
        where = f"{path}, row {number}"
        if len(fields) > len(names):
            rejected.append(InputError(where, "fields", f"at most {len(names)}", len(fields)))
        else:
            rows.append(Row(where, dict(zip(names, fields, strict=False))))
    return rows, rejected


def collect(
    rows: Iterable[Row],
    rejected: Iterable[InputError],
    parse: Callable[[Row], WeakLabel | CleanStatement | None],
) -> Records:
    """Parse row by row; InputError rejects its row, None says that it tells of something else."""
    labels, clean, errors, others = [], [], list(rejected), 0
    for row in rows:
        try:
            record = parse(row)
        except InputError as error:
            errors.append(error)
            continue
        if isinstance(record, WeakLabel):
            labels.append(record)
        elif isinstance(record, CleanStatement):
            clean.append(record)
        else:
            others += 1
    return Records(tuple(labels), tuple(clean), tuple(errors), others)
