"""Rankings as tables: ``seriesuid,rank,score,why``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable

from deepem.errors import InputError
from deepem.files import atomic_path
from deepem.ranking.strategies import Ranked
from deepem.tables import read_lines

COLUMNS = ["seriesuid", "rank", "score", "why"]


def write_ranking(path: str | os.PathLike[str], ranking: Iterable[Ranked]) -> None:
    """In the order of the ranks; a scan without a score has an empty field."""
    with atomic_path(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in ranking:
            score = "" if one.score is None else f"{one.score:.6g}"
            writer.writerow([one.series_uid, one.rank, score, one.why])


def read_ranking(path: str | os.PathLike[str]) -> list[Ranked]:
    """What `write_ranking` wrote; InputError for anything else."""
    (_, header), *lines = read_lines(path)
    if header != COLUMNS:
        raise InputError(path, "header", ",".join(COLUMNS), ",".join(header))
    ranking = []
    for number, fields in lines:
        try:
            uid, rank, score, why = fields
            ranking.append(Ranked(uid, int(rank), float(score) if score else None, why))
        except ValueError as error:
            where = f"{path}, row {number}"
            raise InputError(where, "fields", "a line of a ranking", error) from error
    return ranking
