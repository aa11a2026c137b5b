"""The one error that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: says where it is, which field, what was expected, what was found.

    where: a file, or a file with its row (``annotations.csv, row 7``).
    """

    def __init__(self, where: object, field: str, expected: str, got: object):
        super().__init__(f"{where}: {field}: expected {expected}, got {got}")
        self.where = str(where)
        self.field = field
        self.expected = expected
        self.got = str(got)
