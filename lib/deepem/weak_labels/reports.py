"""Free-text reports: which nodules they name, where, and in which characters they say so.

A parser by rules, for the English of chest CT reports. Words become `_Event`s; a sentence falls
into clauses at commas, "and" and "with"; neighbouring clauses join to one finding until something
that a nodule has only once (lobe, size, image, the word itself) comes again. What no rule can
place is rejected with its characters, so that a person can look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepem.errors import InputError
from deepem.nodule import MAX_DIAMETER_MM, CleanStatement, Lobe, SliceConvention, WeakLabel
from deepem.weak_labels.records import Records, Row, read_rows


def read_reports(path: str | os.PathLike[str], column: str = "report") -> Records:
    """Reports of a folder of ``<series UID>.txt``, or of a CSV with ``seriesuid`` and ``column``.

    InputError when there is no such folder or table; reports that cannot be used, or that say
    nothing of nodules, are rejected one by one.
    """
    path, column = Path(path), column.lower()
    if path.is_file():
        rows, rejected = read_rows(path, ("seriesuid", column))
        return Records.merged([Records(rejected=tuple(rejected)), *(_row(r, column) for r in rows)])
    if not path.is_dir():
        raise InputError(path, "reports", "a folder of .txt files or a CSV file", "nothing there")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    if not files:
        raise InputError(path, "reports", "files <series UID>.txt", "none")
    return Records.merged(map(_file, files))


def _row(row: Row, column: str) -> Records:
    try:
        uid = row.required("seriesuid", "a series UID")
    except InputError as error:
        return Records(rejected=(error,))
    return parse_report(row.text(column), uid, row.where)


def _file(file: Path) -> Records:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Records(rejected=(InputError(file, "file", "a readable UTF-8 text", error),))
    return parse_report(text, file.stem, str(file))


def parse_report(text: str, series_uid: str, where: str) -> Records:
    """Nodules of one report; ``source`` of each is ``where[start:end]``, characters of ``text``.

    Read are the findings, and the impression only where they name no nodule (it repeats them).
    A report that says without limits that there are no nodules gives a `CleanStatement`. Image
    numbers are InstanceNumbers, of the series that the report names. A size is the mean of the
    stated axes. Not nodules: negated, resolved and resected ones, lymph nodes, those of other
    organs. Not sizes: earlier ones, distances, limits ("up to 4 mm"), slice thickness.
    """
    reading = _Reading(series_uid, where, text)
    for spans in _sections(text):
        for start, end in spans:
            reading.read(start, end)
        if reading.labels or reading.clean:
            break
    return reading.records()


@dataclass(frozen=True)
class _Event:
    """Something that a report says in ``[start, end)``; its value depends on the kind.

    lobe: list of Lobe, or None for one that does not exist. image: list of (series, number).
    size: mm. nodule: whether in the plural. attenuation, margin: their name. Without value: other
    (what is measured too, but no nodule), background (no nodule, but around one), gone (resolved,
    resected), largest, ignored.
    """

    kind: str
    start: int
    end: int
    value: Any = None


_ONCE = frozenset({"lobe", "size", "image", "nodule", "other"})
"""What a finding has only once; ``nodule`` and ``other`` exclude each other."""


@dataclass
class _Finding:
    """Neighbouring clauses about one thing."""

    events: list[_Event]

    def has(self, kind: str) -> bool:
        return any(event.kind == kind for event in self.events)

    def value(self, kind: str) -> Any:
        """Of the first event of this kind; None when there is none."""
        return next((event.value for event in self.events if event.kind == kind), None)

    @property
    def span(self) -> tuple[int, int]:
        return min(e.start for e in self.events), max(e.end for e in self.events)


# --- Words -------------------------------------------------------------------------------------

_NUMBER = r"\d+(?:\.\d+)?"
_SIZE = (
    rf"(?<![\d.:/]){_NUMBER}(?:\s*-\s*{_NUMBER})?"
    rf"(?:\s*-?(?:mm|cm)?\s*(?:x|×|\*|by)\s*{_NUMBER}){{0,2}}\s*-?\s*(?:mm|cm)\b"
)
_IMAGE_WORD = r"\b(?:images?|img|im|slices?|i)[\s.:#]*"
_SERIES_WORD = r"\b(?:series|ser|se|s)[\s.:#]*"
_IMAGE_NUMBER = r"(?P<image>\d{1,5})(?:\s*-\s*(?P<last>\d{1,5}))?\b"
_SERIES_NUMBER = r"(?P<series>\d{1,5})"
_IMAGES = (
    rf"{_SERIES_WORD}{_SERIES_NUMBER}[\s,;:/(-]*{_IMAGE_WORD}{_IMAGE_NUMBER}",
    rf"{_IMAGE_WORD}{_IMAGE_NUMBER}[\s,;(]*(?:of|on|in)?\s*{_SERIES_WORD}{_SERIES_NUMBER}\b",
    rf"\b(?:images?|img|im|slices?)\s*(?:number|no\.|#|:|\.)?\s*{_IMAGE_NUMBER}",
    rf"(?<=[(\[,\s]){_SERIES_NUMBER}\s*:\s*{_IMAGE_NUMBER}(?!\s*:)",  # inside brackets only
    rf"(?<=[\[,\s]){_SERIES_NUMBER}\s*/\s*{_IMAGE_NUMBER}(?!\s*/)",  # inside [] only
)
_WORDS_OF_SIZE = r"(?:[\s,:(~]|was|measured|measuring|at|of|size|about|approximately|the|study)*"
_NOT_A_SIZE = (
    rf"\b(?:previously|formerly|priorly|prior|compared (?:to|with)|versus|vs\.?){_WORDS_OF_SIZE}"
    rf"{_SIZE}(?:\s*\(\s*\d+\s*:\s*\d+\s*\))?",
    rf"[,(]\s*was\s+{_SIZE}",
    rf"\bfrom\s+{_NUMBER}\s*(?:mm|cm)?(?:\s*(?:x|×|by)\s*{_NUMBER}\s*(?:mm|cm)?)?\s+to\b",
    rf"\bfrom\s+{_SIZE}",
    rf"{_SIZE}\s+(?:previously|formerly|on (?:the )?prior(?: \w+)?)\b(?!\W*(?:\w+\W+){{0,3}}\d)",
    rf"{_SIZE}\s+(?:(?:away|above|below|deep to|(?:super|infer|anter|poster)ior to)\b|"
    r"from (?:the|its)\b)",
    rf"{_SIZE}[\s-]*(?:thick|slice|section|collimation|interval|increment|axial image)",
    rf"(?:less than|smaller than|larger than|greater than|more than|up to|under|over|at least|sub|"
    rf"[<>≤≥]=?)[\s-]*(?:or equal to\s+)?{_SIZE}",
    rf"\b(?:increased|decreased|grown|enlarged)\s+(?:in size\s+)?by\s+{_SIZE}",
)

_SIDE = r"(?:right|left|rt|lt)"
_LEVEL = r"(?:upper|middle|lower)"
_BY_SIDE = {
    ("r", "upper"): Lobe.RUL, ("r", "middle"): Lobe.RML, ("r", "lower"): Lobe.RLL,
    ("l", "upper"): Lobe.LUL, ("l", "lower"): Lobe.LLL,
}  # fmt: skip
_BY_NAME = {lobe.value.lower(): lobe for lobe in Lobe}
_LEFT_UPPER = r"(?:left upper lobe|\bLUL)"
_LINGULA = (
    rf"(?:{_LEFT_UPPER}\s*[,(]?\s*)?\blingula[r]?\b(?:\s+segment)?"
    rf"(?:\s+(?:of|in)\s+(?:the\s+)?{_LEFT_UPPER})?"
)
_LOBE_OF_LUNG = rf"\b({_LEVEL})\s+lobe\s+of\s+(?:the\s+)?({_SIDE})(?:\s+lung)?\b"
_LOBES_BY_SIDE = (
    rf"\b{_SIDE}\.?\s+{_LEVEL}(?:\s+lobe)?(?:\s*(?:,\s*and|,|and|&|/)\s*(?:{_SIDE}\.?\s+)?{_LEVEL}"
    r"(?=\W+(?:lobes?|and|upper|middle|lower|right|left)\b)(?:\s+lobe)?)*\s+lobes?\b"
    rf"|\b{_SIDE}\.?\s+{_LEVEL}\s+lobes?\b"
)
_BOTH_SIDES = rf"\b(?:(?:both|bilateral)\s+({_LEVEL})\s+lobes?|({_LEVEL})\s+lobes)\b"
_APEX = rf"\b({_SIDE})\s+(?:lung\s+)?(?:apex|apical)\b"

_ORGAN = (
    r"(?:thyroid|adrenal|breast|hepatic|liver|renal|kidney|splenic|pancreatic|subcutaneous|skin|"
    r"soft[- ]tissue|pleural|peritoneal|mediastinal|hilar|chest wall|axillary)"
)
_NODULE = (
    r"\b(?:micro)?nodule(?P<s1>s?)\b|\bnodular\s+(?:opacit(?:y|(?P<s2>ies))|lesion(?P<s3>s?)|"
    r"densit(?:y|(?P<s4>ies)))\b|\b(?:lung|pulmonary)\s+lesion(?P<s5>s?)\b|\bmass(?P<s6>es)?\b|"
    r"\bGGN(?P<s7>s?)\b"
)

_PATTERNS: tuple[tuple[str, str, Any], ...] = (
    # Earlier patterns take their characters away from later ones.
    *(("ignored", pattern, None) for pattern in _NOT_A_SIZE),
    *(("image", rf"{pattern}(?:\s*[)\]])?", None) for pattern in _IMAGES),
    ("ignored", r"\b(?:no|without)\s+(?:a\s+|any\s+)?(?:solid component|spiculation)|"
                r"\b(?:not|non)[\s-]*spiculated", None),
    ("attenuation", rf"{_SIZE}\s+solid (?:component|part|core)\b", "part_solid"),
    ("size", _SIZE, None),
    ("lobe", _LINGULA, None),
    ("lobe", _LOBE_OF_LUNG, None),
    ("lobe", _LOBES_BY_SIDE, None),
    ("lobe", _BOTH_SIDES, None),
    ("lobe", r"\bmiddle lobe\b", None),
    ("lobe", r"\b(?:RUL|RML|RLL|LUL|LLL|LML)\b", None),
    ("lobe", _APEX, None),
    ("other", rf"\blymph\s+nodes?\b|\b(?:lymph)?adenopathy\b|\bnodes\b|\b{_ORGAN}\s+(?:\w+\s+)?"
              rf"(?:nodules?|mass(?:es)?|lesions?|nodes?)\b|\bnodules?\s+(?:in|of)\s+the\s+{_ORGAN}|"
              r"\bgranulomas?\b|\bstatus post\b|\bs/p\b|\w+ectomy\b|\bcysts?\b|\beffusions?\b|"
              r"\baneurysms?\b", None),
    ("nodule", _NODULE, None),
    ("background", r"\bopacit(?:y|ies)\b|\bconsolidations?\b|\batelectasis\b|\bscar(?:ring)?\b|"
                   r"\bemphysema\b|\bbronchiectasis\b|\bbull(?:a|ae)\b|\bthickening\b|"
                   r"\binfiltrates?\b|\bcatheter\b|\btube\b|\bembol\w+|\bpneumo\w+", None),
    ("gone", r"\b(?<!not )(?<!partially )(?<!incompletely )resolved\b|\bresected\b|\bresection\b|"
             r"\bno longer\b|\bdisappeared\b|\bremoved\b|\bexcised\b|"
             r"\bnot (?:seen|identified|visuali[sz]ed|visible|present|evident)\b", None),
    ("largest", r"\b(?:largest|dominant|biggest)\b", None),
    ("attenuation", r"\bpart(?:ly|ially)?[\s-]*solid\b|\b(?:sub|semi)[\s-]?solid\b|"
                    r"\bmixed\b|\bsolid component\b", "part_solid"),
    ("attenuation", r"\bground[\s-]?glass\b|\bnon[\s-]?solid\b|\bGGO\b", "ground_glass"),
    ("attenuation", r"\bsolid\b", "solid"),
    ("margin", r"\bspiculat(?:ed|ion|ions)\b", "spiculated"),
    ("margin", r"\blobulat(?:ed|ion|ions)\b", "lobulated"),
    ("margin", r"\b(?:ill|poorly)[\s-](?:defined|marginated|circumscribed)\b", "poorly_defined"),
    ("margin", r"\bsmooth(?:ly)?\b|\bwell[\s-](?:defined|marginated|circumscribed)\b", "smooth"),
)  # fmt: skip
_COMPILED = [(kind, re.compile(p, re.IGNORECASE), value) for kind, p, value in _PATTERNS]


def _events(text: str, start: int, end: int) -> list[_Event]:
    """Everything said between ``start`` and ``end``, in order, without overlap."""
    taken = bytearray(end - start)
    events: list[_Event] = []
    for kind, pattern, value in _COMPILED:
        for match in pattern.finditer(text, start, end):
            span = slice(match.start() - start, match.end() - start)
            if any(taken[span]) or (kind == "image" and not _is_image(text, start, match)):
                continue
            taken[span] = b"\1" * (match.end() - match.start())
            found = _VALUES[kind](match) if kind in _VALUES else value
            events.append(_Event(kind, match.start(), match.end(), found))
    events.sort(key=lambda event: event.start)
    return _joined(events, text)


def _joined(events: list[_Event], text: str) -> list[_Event]:
    """Neighbouring lobes, and neighbouring images of one bracket, as one event each."""
    joined: list[_Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if last and event.kind == last.kind and event.kind in ("lobe", "image"):
            between = text[last.end : event.start]
            if last.value and event.value and re.fullmatch(_LISTED, between, re.IGNORECASE):
                joined[-1] = replace(last, end=event.end, value=last.value + event.value)
                continue
        joined.append(event)
    return joined


_LISTED = r"\s*(?:,|;|&|/|and|,\s*and)\s*(?:in\s+)?(?:the\s+)?"


def _is_image(text: str, start: int, match: re.Match[str]) -> bool:
    """``3:45`` is an image inside brackets only (else a time), ``3/45`` inside [] (else a date)."""
    found = match.group()
    if found[0].isalpha():
        return True
    before = text[start : match.start()]
    square = before.rfind("[") > before.rfind("]")
    return square or (":" in found and before.rfind("(") > before.rfind(")"))


def _image(match: re.Match[str]) -> list[tuple[int | None, int]]:
    groups = match.groupdict()
    first, last = int(groups["image"]), int(groups["last"] or groups["image"])
    series = groups.get("series")
    return [(int(series) if series else None, (first + max(first, last)) // 2)]


def _size_mm(match: re.Match[str]) -> float:
    found = match.group().lower()
    axes = [float(number) for number in re.findall(_NUMBER, found)]
    return sum(axes) / len(axes) * (10 if found.endswith("cm") else 1)


def _lobes(match: re.Match[str]) -> list[Lobe] | None:
    """The lobes that the words name; None when there is no such lobe."""
    found = match.group().lower()
    if "lingula" in found:
        return [Lobe.LINGULA]
    if found in _BY_NAME:
        return [_BY_NAME[found]]
    if found == "middle lobe":
        return [Lobe.RML]
    sides = re.findall(r"\b[rl](?=ight|eft|t)", found)
    levels = re.findall(_LEVEL, found) or (["upper"] if "ap" in found else [])
    if not levels:
        return None
    if not sides:
        pairs = [(side, level) for level in levels for side in "rl"]
    elif " of " in found:
        pairs = [(sides[0], levels[0])]
    else:
        pairs, side = [], sides[0]
        for word in re.findall(rf"{_SIDE}|{_LEVEL}|ap", found):
            if re.fullmatch(_SIDE, word):
                side = word[0]
            else:
                pairs.append((side, "upper" if word == "ap" else word))
    lobes = [_BY_SIDE.get(pair) for pair in pairs]
    return None if None in lobes else [lobe for lobe in lobes if lobe]


_VALUES = {
    "image": _image,
    "size": _size_mm,
    "lobe": _lobes,
    "nodule": lambda match: any(match.groupdict().values()),
}

# --- Sentences ---------------------------------------------------------------------------------

_HEADING = re.compile(
    r"^[ \t]*(?P<name>findings?|impressions?|conclusions?|opinion|technique|comparisons?|procedure|"
    r"(?:clinical\s+)?(?:history|indications?|information)|reason(?:\s+for\s+[\w ]+)?|"
    r"exam(?:ination)?|recommendations?)[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(
    r"[.!?](?=\s|$)|;|\n[ \t]*\n|\n(?=[ \t]*(?:[-*•]|\d+[.)])\s)|"
    r"\n(?=[ \t]*[A-Za-z][A-Za-z ]{1,40}:)"
)
_CLAUSE_END = re.compile(r",|\band\b|\bwith\b|\bas well as\b|\bplus\b|\bbut\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|without|free of|negative for|absence of)\b", re.IGNORECASE)
_NO_ENDS = re.compile(
    r"[\d.:;()]|\b(?:but|however|except|apart|there|with|changes?|growth|increase|unchanged|stable|"
    r"is|are|has|have)\b|,\s*(?:a|an)\b",
    re.IGNORECASE,
)
_WORDS_BEFORE = re.compile(
    r"(?:[\s,]|\b(?:evidence|of|a|any|pulmonary|lung|intrapulmonary|parenchymal|discrete|definite|"
    r"visible|focal|airspace|disease|and|or|opacit(?:y|ies)|consolidations?|infiltrates?|mass|"
    r"masses|nodules?|effusions?|pleural)\b)*",
    re.IGNORECASE,
)
_WORDS_AFTER = re.compile(
    r"(?:[\s,]|\b(?:or|and|mass|masses|consolidations?|opacit(?:y|ies)|infiltrates?|airspace|"
    r"disease|pleural|effusions?|lymphadenopathy|adenopathy|is|are|seen|identified|present|noted|"
    r"visuali[sz]ed|detected|visible|evident|in|either|both|the|lungs?)\b)*",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\brecommend|\bfollow[\s-]?up|\bfleischner|\bguideline|\bprotocol|\bhistory of|\bevaluat|"
    r"\blung-?rads|\bscreening",
    re.IGNORECASE,
)
_SAME_AGAIN = re.compile(r"\W*(?:it|this|that|the\s+(?:nodule|lesion|mass))\b", re.IGNORECASE)


def _sections(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Spans of the findings (all text without a heading is one), and of the impression."""
    headings = list(_HEADING.finditer(text))
    findings, impression = [(0, headings[0].start() if headings else len(text))], []
    ends = [*(heading.start() for heading in headings), len(text)][1:]
    for heading, end in zip(headings, ends, strict=True):
        name = heading["name"].lower()
        if name.startswith("finding"):
            findings.append((heading.end(), end))
        elif name.startswith(("impression", "conclusion", "opinion")):
            impression.append((heading.end(), end))
    return findings, impression


def _split(
    pattern: re.Pattern[str], text: str, start: int, end: int, events: list[_Event]
) -> Iterator[tuple[int, int]]:
    """Pieces of ``[start, end)`` between the matches that do not lie inside an event."""
    cuts = [
        match.end()
        for match in pattern.finditer(text, start, end)
        if not any(e.start < match.end() and match.start() < e.end for e in events)
    ]
    for piece in pairwise([start, *cuts, end]):
        if text[slice(*piece)].strip():
            yield piece


def _findings(text: str, start: int, end: int, events: list[_Event]) -> list[_Finding]:
    """Events of one sentence, grouped to findings."""
    findings: list[_Finding] = []
    for first, last in _split(_CLAUSE_END, text, start, end, events):
        clause = [event for event in events if first <= event.start < last]
        if any(event.kind == "nodule" for event in clause):
            clause = [event for event in clause if event.kind != "other"]
        fresh = not findings
        if findings:
            so_far = _subjects(findings[-1].events)
            fresh = bool(so_far & _subjects(clause))
        for event in clause:
            again = event.kind in ("lobe", "image") and findings and findings[-1].has(event.kind)
            if fresh or again:
                findings.append(_Finding([]))
                fresh = False
            findings[-1].events.append(event)
    return [finding for finding in findings if finding.events]


def _subjects(events: list[_Event]) -> set[str]:
    """What of `_ONCE` is there."""
    kinds = {event.kind for event in events} & _ONCE
    return kinds - {"nodule", "other"} | ({"subject"} if kinds & {"nodule", "other"} else set())


def _lobes_of(findings: list[_Finding], at: int) -> list[Lobe] | None:
    """Lobes of one finding of a sentence, or the one lobe that a neighbour says for both.

    The one before speaks for "RUL nodules of 4 mm and 6 mm" and for a list that begins with its
    lobe, the one behind for "4 mm and 6 mm nodules in the RUL". None for a lobe that is none.
    """
    finding = findings[at]
    if finding.has("lobe"):
        return finding.value("lobe")
    near = None
    if at and findings[at - 1].has("lobe"):
        if not finding.has("nodule") or findings[0].events[0].kind == "lobe":
            near = findings[at - 1]
    elif at + 1 < len(findings) and not finding.has("nodule"):
        near = findings[at + 1]
    lobes = near.value("lobe") if near else []
    return lobes if lobes and len(lobes) == 1 else []


class _Reading:
    """What was understood of one report so far."""

    def __init__(self, series_uid: str, where: str, text: str) -> None:
        self.series_uid, self.where, self.text = series_uid, where, text
        self.labels: list[WeakLabel] = []
        self.clean: list[CleanStatement] = []
        self.rejected: list[InputError] = []

    def read(self, start: int, end: int) -> None:
        """Understand one section, sentence by sentence."""
        events = _events(self.text, start, end)
        for first, last in _split(_SENTENCE_END, self.text, start, end, events):
            self._sentence(first, last, [e for e in events if first <= e.start < last])

    def records(self) -> Records:
        """Everything; a report that gave nothing, or calls itself clean and is not, is rejected."""
        clean, rejected = self.clean[:1], list(self.rejected)
        if clean and rejected:
            rejected.append(InputError(clean[0].source, "no nodules", "no other word on nodules",
                                       "nodules without a place"))  # fmt: skip
            clean = []
        if not (self.labels or clean or rejected):
            expected = "a nodule, or that there are none at all"
            rejected.append(InputError(self.where, "text", expected, "neither"))
        return Records(tuple(self.labels), tuple(clean), tuple(rejected))

    def _sentence(self, start: int, end: int, events: list[_Event]) -> None:
        findings = _findings(self.text, start, end, events)
        negated = {
            event.start
            for event in events
            if event.kind == "nodule" and self._is_negated(start, event)
        }
        if negated and self._is_clean(start, end):
            self.clean.append(CleanStatement(self.series_uid, self._source(start, end)))
            return
        named = [self._names_nodule(finding, negated) for finding in findings]
        again = bool(_SAME_AGAIN.match(self.text, start, end)) and len(findings) == 1
        advice = bool(_ADVICE.search(self.text, start, end))
        for at, finding in enumerate(findings):
            if again and self._completes_last(finding):
                self._complete_last(finding)
                continue
            idle = advice and not (finding.has("lobe") or finding.has("image"))
            meant = named[at] or self._is_meant(finding, any(named))
            if meant and not idle and not finding.has("gone"):
                self._add(finding, _lobes_of(findings, at))

    def _names_nodule(self, finding: _Finding, negated: set[int]) -> bool:
        words = [event for event in finding.events if event.kind == "nodule"]
        return bool(words) and not any(event.start in negated for event in words)

    def _is_meant(self, finding: _Finding, nodules_around: bool) -> bool:
        """Whether a nodule is meant without the word: "and 6 mm (3:60)", "RUL 5 mm (3:45)"."""
        if finding.has("nodule") or finding.has("other"):
            return False
        if nodules_around:
            return finding.has("size") or finding.has("image")
        return all(map(finding.has, ("lobe", "size", "image"))) and not finding.has("background")

    def _is_negated(self, start: int, nodule: _Event) -> bool:
        """Whether a "no" before the word still holds there."""
        words = list(_NO.finditer(self.text, start, nodule.start))
        return bool(words) and not _NO_ENDS.search(self.text, words[-1].end(), nodule.start)

    def _is_clean(self, start: int, end: int) -> bool:
        """Whether the sentence says of the whole scan, and of every nodule, that there is none."""
        sentence = self.text[start:end].strip().rstrip(".!;")
        before = re.match(r"(?:.*:)?\s*(?:there\s+(?:is|are)\s+)?", sentence, re.I | re.S)
        rest = sentence[before.end() :] if before else sentence
        no = _NO.match(rest)
        word = re.search(r"\bnodules?\b", rest, re.IGNORECASE)
        return bool(
            no
            and word
            and _WORDS_BEFORE.fullmatch(rest[no.end() : word.start()])
            and _WORDS_AFTER.fullmatch(rest[word.end() :])
        )

    def _completes_last(self, finding: _Finding) -> bool:
        """Whether it can be about the last nodule: another lobe or image is another nodule."""
        if not self.labels or finding.has("lobe") or finding.has("other"):
            return False
        return self.labels[-1].slice_number is None or not finding.has("image")

    def _complete_last(self, finding: _Finding) -> None:
        """What the last nodule did not have yet, as in "It measures 5 mm"."""
        last = self.labels.pop()
        if finding.has("gone"):
            return
        size = finding.value("size")
        if last.diameter_mm is None and size is not None and 0 < size <= MAX_DIAMETER_MM:
            last = replace(last, diameter_mm=size)
        images = finding.value("image")
        if last.slice_number is None and images:
            last = replace(last, slice_number=images[0][1], series_number=images[0][0],
                           slice_convention=SliceConvention.DICOM_INSTANCE)  # fmt: skip
        self.labels.append(
            replace(
                last,
                source=f"{last.source}[{finding.span[0]}:{finding.span[1]}]",
                attenuation=last.attenuation or _attenuation(finding),
                margin=last.margin or finding.value("margin"),
            )
        )

    def _add(self, finding: _Finding, lobes: list[Lobe] | None) -> None:
        """Labels of one finding: one for each lobe, or for each image of several nodules."""
        source = self._source(*finding.span)
        said = self.text[slice(*finding.span)]
        size, images = finding.value("size"), finding.value("image") or []
        if lobes is None:
            lobe_names = ", ".join(lobe.value for lobe in Lobe)
            self.rejected.append(InputError(source, "lobe", f"one of {lobe_names}", repr(said)))
            return
        if size is not None and not 0 < size <= MAX_DIAMETER_MM:
            expected = f"a size in (0, {MAX_DIAMETER_MM:g}] mm"
            self.rejected.append(InputError(source, "size", expected, repr(said)))
            return
        if not lobes and not images and size is None:
            expected = "a lobe, an image or a size of the nodule"
            self.rejected.append(InputError(source, "place", expected, repr(said)))
            return
        several = finding.value("nodule") and len({series for series, _ in images}) == 1
        if len(lobes) <= 1:
            images = images if several else images[:1]
            places = [(lobes[0] if lobes else None, image) for image in images or [None]]
        elif len(images) in (0, len(lobes)):
            places = list(zip(lobes, images or [None] * len(lobes), strict=True))
        else:
            expected = f"one image for each of {len(lobes)} lobes"
            self.rejected.append(InputError(source, "image", expected, repr(said)))
            places = [(lobe, None) for lobe in lobes]
        if len(places) > 1 and finding.has("largest"):
            size = None
        for lobe, image in places:
            self.labels.append(
                WeakLabel(
                    self.series_uid,
                    lobe,
                    image[1] if image else None,
                    SliceConvention.DICOM_INSTANCE if image else None,
                    diameter_mm=size,
                    attenuation=_attenuation(finding),
                    source=source,
                    margin=finding.value("margin"),
                    series_number=image[0] if image else None,
                )
            )

    def _source(self, start: int, end: int) -> str:
        text = self.text[start:end]
        start += len(text) - len(text.lstrip())
        return f"{self.where}[{start}:{start + len(text.strip())}]"


def _attenuation(finding: _Finding) -> str | None:
    """Ground glass with a solid part is part-solid, in whatever order it is said."""
    said = {event.value for event in finding.events if event.kind == "attenuation"}
    if "part_solid" in said or {"ground_glass", "solid"} <= said:
        return "part_solid"
    return next(iter(said), None)
