"""The command line: ``deepem phantom | train | detect | evaluate | weak-labels check | e-step |
rank``.

Exit code 0: done; 1: done, but some scans could not be used (they are listed); 2: bad input, one
line on standard error; 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

import deepem
from deepem.em import METHODS, EmConfig
from deepem.errors import InputError
from deepem.ranking.strategies import DEFAULT, STRATEGIES

logger = logging.getLogger("deepem")
_console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    _log_to_stderr()
    try:
        return options.run(options)
    except (InputError, ValueError) as error:
        print(f"deepem {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"deepem {options.command}: interrupted", file=sys.stderr)
        return 130


def _log_to_stderr() -> None:
    """Beside the progress bar on a terminal; in plain lines that can be searched elsewhere."""
    if _console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=_console, show_path=False, show_level=False, markup=False
        )
        line = "%(message)s"
    else:
        handler = logging.StreamHandler()
        line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, handlers=[handler], force=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepem", description="Pulmonary nodule detection from strong and weak labels."
    )
    parser.add_argument("--version", action="version", version=f"deepem {deepem.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        one = commands.add_parser(
            name, help=summary, description=summary, formatter_class=formatter
        )
        one.set_defaults(run=run)
        one.add_argument("--seed", type=int, default=0, help="of every random choice")
        one.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
        return one

    one = command("phantom", _phantom, "Make synthetic chest CTs with known nodules.")
    one.add_argument("--out", type=Path, required=True, metavar="DIR")
    one.add_argument("--count", type=_positive_int, required=True, metavar="N")
    one.add_argument("--size", choices=("mini", "full"), default="mini")
    one.add_argument("--dicom", action="store_true", help="DICOM series instead of NIfTI files")

    one = command("train", _train, "Train a detector on marked scans, and on records by EM.")
    one.add_argument("--studies", type=Path, required=True, nargs="+", metavar="DIR")
    one.add_argument("--annotations", type=Path, nargs="+", default=[], metavar="CSV",
                     help="seriesuid,coordX,coordY,coordZ,diameter_mm in LPS mm; may be left out "
                     "with --init and weak labels")  # fmt: skip
    one.add_argument("--out", type=Path, required=True, metavar="MODEL_DIR",
                     help="gets model.pt if the result beats the one that is there")  # fmt: skip
    one.add_argument("--series", type=Path, nargs="+", default=[], metavar="CSV",
                     help="series that were read completely; those without a row in --annotations "
                     "are clean (default: only series with annotations)")  # fmt: skip
    one.add_argument("--patients", type=Path, metavar="CSV",
                     help="seriesuid,patient_id (default: DICOM PatientID, else every series its "
                     "own patient)")  # fmt: skip
    one.add_argument("--init", type=Path, metavar="MODEL", help="start from this model")
    one.add_argument("--preset", choices=("slim", "paper"), default="slim")
    one.add_argument("--cache", type=Path, metavar="DIR",
                     help="prepared scans, may be shared (default: MODEL_DIR/cache)")  # fmt: skip
    length = one.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive_int, metavar="N", help="(default: 4000)")
    length.add_argument("--minutes", type=float, metavar="M")
    weak = one.add_argument_group("EM on scans that only have records")
    weak.add_argument("--weak-labels", type=Path, metavar="CSV")
    weak.add_argument("--reports", type=Path, metavar="DIR_OR_CSV", help="free text")
    weak.add_argument("--method", choices=("none", *METHODS), default=EmConfig.method,
                      help="none: the same training on marked scans alone")  # fmt: skip
    weak.add_argument("--rounds", type=_positive_int, default=EmConfig.rounds)
    weak.add_argument("--warm-start", type=float, default=EmConfig.warm_start, metavar="SHARE",
                      help="of the training on marked scans before the first round; without --init "
                      "only")  # fmt: skip
    weak.add_argument("--scans-per-round", type=_positive_int, default=EmConfig.scans_per_round)
    weak.add_argument("--null", type=float, default=EmConfig.null, metavar="WEIGHT",
                      help="of the case that the detector missed the nodule; 0: none")  # fmt: skip
    weak.add_argument("--joint", action=argparse.BooleanOptionalAction, default=EmConfig.joint,
                      help="no two labels describe one nodule")  # fmt: skip
    weak.add_argument("--odds", action=argparse.BooleanOptionalAction, default=EmConfig.odds,
                      help="weigh proposals by p / (1 - p), not by p")  # fmt: skip
    weak.add_argument("--certain", type=float, default=EmConfig.certain, metavar="P",
                      help="a proposal with less of a label is not taught to be its nodule, but "
                      "for the best three labels in ten; the paper: 0")  # fmt: skip
    weak.add_argument("--best-proposes", action=argparse.BooleanOptionalAction,
                      default=EmConfig.best_proposes,
                      help="E-steps by the best network so far, not by the newest")  # fmt: skip
    weak.add_argument("--rejected", action=argparse.BooleanOptionalAction,
                      default=EmConfig.rejected,
                      help="where a nodule is known the rest is background, and proposals "
                      "that no label can mean are taught to be none")  # fmt: skip
    weak.add_argument("--size", action=argparse.BooleanOptionalAction, default=EmConfig.size,
                      help="reported diameters are evidence")  # fmt: skip
    weak.add_argument("--attenuation", action=argparse.BooleanOptionalAction,
                      default=EmConfig.attenuation, help="so is ground glass or solid")  # fmt: skip
    weak.add_argument("--wrong-lobe", type=float, default=EmConfig.wrong_lobe, metavar="SHARE",
                      help="of records that may name another lobe")  # fmt: skip
    weak.add_argument("--slice-off", type=float, default=EmConfig.slice_off_mm, metavar="MM",
                      help="standard deviation of the error of reported slices")  # fmt: skip

    one = command("detect", _detect, "Find nodules in scans.")
    one.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_DIR")
    one.add_argument("--model", type=Path, required=True, metavar="MODEL")
    one.add_argument("--out", type=Path, required=True, metavar="CSV")
    one.add_argument("--pictures", type=Path, metavar="DIR",
                     help="also draw the findings of every scan")  # fmt: skip
    one.add_argument("--sr", type=Path, metavar="DIR",
                     help="also write a DICOM SR for every DICOM series")  # fmt: skip
    one.add_argument("--sr-score", type=float, default=0.5, metavar="P",
                     help="findings with at least this score go into the report")  # fmt: skip

    one = command("evaluate", _evaluate, "FROC and CPM by the rules of LUNA16.")
    one.add_argument("--annotations", type=Path, required=True, metavar="CSV")
    one.add_argument("--predictions", type=Path, required=True, metavar="CSV")
    one.add_argument("--excluded", type=Path, metavar="CSV",
                     help="findings that count neither as nodule nor as error")  # fmt: skip
    one.add_argument("--series", type=Path, metavar="CSV",
                     help="the scans that count (default: those in the tables)")  # fmt: skip
    one.add_argument("--json", type=Path, required=True, metavar="OUT")
    one.add_argument("--plot", type=Path, metavar="PNG")

    one = command("weak-labels", _weak_labels, "Audit records before anything is trained on them.")
    one.add_argument("action", choices=("check",))
    one.add_argument("--studies", type=Path, required=True, metavar="DIR")
    one.add_argument("--weak-labels", type=Path, metavar="CSV")
    one.add_argument("--nlst", type=Path, metavar="CSV", help="Spiral CT Abnormalities table")
    one.add_argument("--nlst-series", type=Path, metavar="CSV", help="pid,study_yr,seriesuid")
    one.add_argument("--reports", type=Path, metavar="DIR_OR_CSV", help="free text")

    one = command("e-step", _e_step, "Which proposal does each weak label describe?")
    one.add_argument("--studies", type=Path, required=True, metavar="DIR")
    one.add_argument("--weak-labels", type=Path, required=True, metavar="CSV")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="MODEL")
    source.add_argument("--proposals", type=Path, metavar="CSV", help="as `detect` writes them")
    one.add_argument("--method", choices=tuple(METHODS), default="map")
    one.add_argument("--null", type=float, nargs="?", const=0.1, default=0.0, metavar="WEIGHT",
                     help="let the null hypothesis compete (without WEIGHT: 0.1)")  # fmt: skip
    one.add_argument("--joint", action="store_true", help="no two labels describe one nodule")
    one.add_argument("--odds", action="store_true",
                     help="weigh proposals by p / (1 - p), not by p")  # fmt: skip
    one.add_argument("--size", action="store_true", help="reported diameters are evidence too")
    one.add_argument("--attenuation", action="store_true", help="so is ground glass or solid")
    one.add_argument("--json", type=Path, required=True, metavar="OUT")

    one = command("rank", _rank, "Which scan should be labelled next?")
    one.add_argument("--model", type=Path, required=True, metavar="MODEL")
    one.add_argument("--studies", type=Path, required=True, nargs="+", metavar="DIR")
    one.add_argument("--annotations", type=Path, nargs="+", default=[], metavar="CSV",
                     help="scans in these tables are labelled: they are not ranked")  # fmt: skip
    one.add_argument("--series", type=Path, nargs="+", default=[], metavar="CSV",
                     help="so are these, with or without a nodule")  # fmt: skip
    one.add_argument("--weak-labels", type=Path, metavar="CSV")
    one.add_argument("--reports", type=Path, metavar="DIR_OR_CSV", help="free text")
    one.add_argument("--strategy", choices=tuple(STRATEGIES), default=DEFAULT,
                     help="; ".join(f"{name}: {strategy.description}"
                                    for name, strategy in STRATEGIES.items()))  # fmt: skip
    one.add_argument(
        "--out", type=Path, required=True, metavar="CSV", help="seriesuid,rank,score,why"
    )
    one.add_argument("--evidence", type=Path, metavar="DIR",
                     help="what the model sees in each scan is kept here, so that only new scans "
                     "are looked at (default: OUT without its ending, with .evidence)")  # fmt: skip
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


@contextmanager
def _bar(*columns: TextColumn) -> Iterator[Bar]:
    """A progress bar with count, time spent and time left on standard error."""
    with Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
             MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
             TimeRemainingColumn(), *columns, console=_console) as bar:  # fmt: skip
        yield bar


def _phantom(options: argparse.Namespace) -> int:
    from deepem.phantom import write_phantoms

    with _bar() as bar:
        task = bar.add_task("phantoms", total=options.count)
        write_phantoms(
            options.out,
            options.count,
            options.seed,
            options.size,
            dicom=options.dicom,
            on_scan=lambda phantom: bar.advance(task),
        )
    print(
        f"{options.count} scans, annotations.csv, weak_labels.csv and truth.json in {options.out}"
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from deepem.figures import training_plot
    from deepem.files import write_json
    from deepem.fit import Progress, TrainConfig
    from deepem.labelled import LabelledStudy, weak_studies
    from deepem.report import write_report
    from deepem.tables import read_annotations, read_patients, read_series
    from deepem.training import train
    from deepem.volume import find_studies
    from deepem.weak_labels import Records, read_reports, read_weak_labels

    annotations = {
        uid: nodules
        for file in options.annotations
        for uid, nodules in read_annotations(file).items()
    }
    complete = [uid for file in options.series for uid in read_series(file)]
    patients = read_patients(options.patients) if options.patients else {}
    sources = [read_weak_labels(options.weak_labels)] if options.weak_labels else []
    sources += [read_reports(options.reports)] if options.reports else []
    em = _em(options) if sources else None
    config = TrainConfig(
        preset=options.preset,
        steps=None if options.minutes else options.steps or 4000,
        minutes=options.minutes,
        seed=options.seed,
        device=options.device,
        em=em,
    )
    bad: list[str] = []
    studies = {
        study.series_uid: replace(
            study, patient_id=patients.get(study.series_uid, study.patient_id)
        )
        for folder in options.studies
        for study in find_studies(folder, lambda error: bad.append(str(error)))
    }
    wanted = dict.fromkeys([*complete, *annotations])
    folders = ", ".join(map(str, options.studies))
    bad += [
        str(InputError("labels", "seriesuid", f"a scan in {folders}", uid))
        for uid in wanted
        if uid not in studies
    ]
    labelled = [
        LabelledStudy(studies[uid], tuple(annotations.get(uid, ())))
        for uid in wanted
        if uid in studies
    ]
    weak, rejected = weak_studies(Records.merged(sources), studies) if em else ([], [])
    bad += map(str, rejected)
    told = {item.study.series_uid for item in weak}
    unlabelled = len(studies.keys() - wanted.keys() - told)
    if unlabelled:
        logger.info("%d scans without labels are left out", unlabelled)
    with _bar(TextColumn("{task.fields[state]}")) as bar:
        task = bar.add_task("starting", total=None, state="")

        def show(progress: Progress) -> None:
            state = ""
            if progress.stage != "preparing":
                state = f"loss {progress.loss:.3f}  best CPM {progress.best_cpm:.3f}"
            bar.update(task, description=progress.stage, completed=progress.step,
                       total=progress.steps, state=state)  # fmt: skip

        result = train(config, labelled, options.out, weak=weak, init=options.init,
                       cache=options.cache, on_progress=show)  # fmt: skip
    training_plot(
        {f"seed {config.seed}": [[(entry["step"], entry["cpm"]) for entry in result.history]]},
        options.out / "training.png",
    )
    write_json(options.out / "training.json", {"reason": result.reason, "history": result.history})
    bad += result.skipped
    write_report(options.out / "report.html", title=f"Training of {options.out.name}",
                 verdict=result.reason, history=result.history, explained=result.explained,
                 skipped=bad)  # fmt: skip
    print(result.reason)
    return _listed(bad)


def _em(options: argparse.Namespace) -> EmConfig | None:
    """The EM that the options ask for; None for ``--method none``."""
    if options.method == "none":
        return None
    return EmConfig(
        method=options.method,
        rounds=options.rounds,
        warm_start=options.warm_start,
        scans_per_round=options.scans_per_round,
        null=options.null,
        joint=options.joint,
        odds=options.odds,
        certain=options.certain,
        best_proposes=options.best_proposes,
        rejected=options.rejected,
        size=options.size,
        attenuation=options.attenuation,
        wrong_lobe=options.wrong_lobe,
        slice_off_mm=options.slice_off,
    )


def _detect(options: argparse.Namespace) -> int:
    from deepem.detector import Detector
    from deepem.dicom import measurement_report, read_source, write_dicom
    from deepem.figures import slice_with_boxes
    from deepem.nodule import Proposal
    from deepem.scan import prepare
    from deepem.tables import write_predictions
    from deepem.volume import Study, find_studies, read_volume

    if not 0 <= options.sr_score <= 1:
        raise ValueError(f"--sr-score: expected a number in 0..1, got {options.sr_score}")
    detector = Detector.load(options.model, options.device)
    bad: list[str] = []
    studies: dict[str, Study] = {}
    for path in options.images:
        try:
            found = find_studies(path, lambda error: bad.append(str(error)))
        except InputError as error:
            bad.append(str(error))
            continue
        if not found:
            bad.append(str(InputError(path, "images", "at least one CT", "none")))
        for study in found:
            if study.series_uid in studies:
                other = studies[study.series_uid].path
                bad.append(str(InputError(study.path, "series UID", "one that is not used yet",
                                          f"{study.series_uid}, as {other}")))  # fmt: skip
            else:
                studies[study.series_uid] = study
    predictions: dict[str, list[Proposal]] = {}
    with _bar() as bar:
        task = bar.add_task("scans", total=len(studies))
        for uid, study in studies.items():
            try:
                dicom = study.path.is_dir()
                volume = read_volume(study.path, uid if dicom else None)
                scan = prepare(volume)
                predictions[uid] = detector.propose(scan)
                if options.pictures:
                    slice_with_boxes(volume.hu, volume.grid, predictions[uid], [],
                                     options.pictures / f"{uid}.png", title=uid)  # fmt: skip
                if options.sr and not dicom:
                    raise InputError(study.path, "--sr", "a DICOM series to report on", "a file")
                if options.sr:
                    sure = [one for one in predictions[uid] if one.probability >= options.sr_score]
                    report = measurement_report(
                        sure, read_source(study.path, uid), scan.lungs, detector.card
                    )
                    write_dicom(report, options.sr / f"{uid}.dcm")
            except InputError as error:
                bad.append(str(error))
            bar.advance(task)
    write_predictions(options.out, predictions)
    total = sum(map(len, predictions.values()))
    print(f"{total} proposals in {len(predictions)} scans: {options.out}")
    return _listed(bad)


def _evaluate(options: argparse.Namespace) -> int:
    from deepem.figures import froc_plot
    from deepem.files import write_json
    from deepem.froc import bootstrap_cpm, evaluate
    from deepem.tables import read_annotations, read_excluded, read_predictions, read_series

    annotations = read_annotations(options.annotations)
    predictions = read_predictions(options.predictions)
    excluded = read_excluded(options.excluded) if options.excluded else None
    if options.series:
        series = read_series(options.series)
    else:
        series = list(dict.fromkeys([*annotations, *predictions]))
    if not series:
        raise InputError(options.annotations, "scans", "at least one", "none")
    with _console.status("evaluating"):
        froc = evaluate(annotations, predictions, series, excluded)
        rng = np.random.default_rng(options.seed)
        low, high = bootstrap_cpm(annotations, predictions, series, excluded, rng=rng)
    interval = None if np.isnan(low) else [low, high]
    write_json(options.json, froc.report() | {"cpm_interval_95": interval})
    if options.plot:
        froc_plot({options.predictions.stem: froc}, options.plot)
    print("FP/scan      " + "  ".join(f"{rate:<5g}" for rate in froc.fp_per_scan))
    print("sensitivity  " + "  ".join(f"{value:.3f}" for value in froc.sensitivity))
    print(
        f"CPM {froc.cpm:.4f} (95 % {low:.3f} to {high:.3f}); {froc.true_positives} of "
        f"{froc.nodules} nodules in {froc.scans} scans, {froc.false_positives} false positives"
    )
    return 0


def _weak_labels(options: argparse.Namespace) -> int:
    from deepem.weak_labels import check, render

    if not (options.weak_labels or options.nlst or options.reports):
        raise ValueError("expected at least one of --weak-labels, --nlst, --reports")
    bad: list[str] = []
    result = check(
        options.studies,
        options.weak_labels,
        options.nlst,
        options.nlst_series,
        options.reports,
        on_bad=lambda error: bad.append(str(error)),
    )
    Console().print(render(result))
    return _listed(bad) or int(bool(result.rejected))


def _e_step(options: argparse.Namespace) -> int:
    from deepem.detector import Detector
    from deepem.explain import explain
    from deepem.files import write_json
    from deepem.observation import LobeModel, ObservationModel, SizeModel, SliceModel
    from deepem.scan import prepare
    from deepem.tables import read_predictions
    from deepem.volume import find_studies, read_volume
    from deepem.weak_labels import in_patient_space, read_slices, read_weak_labels

    records = read_weak_labels(options.weak_labels)
    detector = Detector.load(options.model, options.device) if options.model else None
    given = read_predictions(options.proposals) if options.proposals else {}
    model = ObservationModel(
        SliceModel(),
        LobeModel.anatomical(),
        SizeModel() if options.size else None,
        options.attenuation,
    )
    rng = np.random.default_rng(options.seed)
    bad = [str(error) for error in records.rejected]
    found = find_studies(options.studies, lambda error: bad.append(str(error)))
    studies = {study.series_uid: study for study in found}
    wanted = {label.series_uid: None for label in records.labels if label.series_uid in studies}
    slices, answers = {}, {}
    with _bar() as bar:
        task = bar.add_task("scans", total=len(wanted))
        for uid in wanted:
            try:
                slices[uid] = read_slices(studies[uid])
            except InputError as error:
                bad.append(str(error))
        placed, rejected = in_patient_space(records.labels, slices)
        bad += map(str, rejected)
        for uid in wanted:
            labels = [label for label in placed if label.series_uid == uid]
            try:
                folder = studies[uid].path.is_dir()
                volume = read_volume(studies[uid].path, uid if folder else None)
            except InputError as error:
                bad.append(str(error))
                continue
            scan = prepare(volume)
            proposals = detector.propose(scan) if detector else given.get(uid, [])
            posterior = explain(
                labels, proposals, scan, model,
                null=options.null, joint=options.joint, odds=options.odds,
            )  # fmt: skip
            chosen = METHODS[options.method](posterior, rng)
            for row, label in enumerate(labels):
                evidence = posterior.log_evidence[row]
                answers[label.source] = {
                    "seriesuid": uid,
                    "source": label.source,
                    "posterior": posterior.posterior[row].tolist(),
                    "null": float(posterior.null[row]),
                    "chosen": chosen[row],
                    "evidence": float(evidence) if np.isfinite(evidence) else None,
                }
            bar.advance(task)
    in_order = [answers[one.source] for one in records.labels if one.source in answers]
    write_json(options.json, {"method": options.method, "labels": in_order})
    unexplained = sum(not answer["chosen"] for answer in in_order)
    print(f"{len(in_order)} labels, {unexplained} of them unexplained: {options.json}")
    return _listed(bad)


def _rank(options: argparse.Namespace) -> int:
    from deepem.detector import Detector
    from deepem.labelled import weak_studies
    from deepem.ranking.evidence import ScanEvidence
    from deepem.ranking.scoring import EvidenceFile, gather, told_by
    from deepem.ranking.strategies import rank
    from deepem.ranking.table import write_ranking
    from deepem.scan import ScanCache
    from deepem.tables import read_annotations, read_series
    from deepem.volume import find_studies
    from deepem.weak_labels import Records, read_reports, read_weak_labels

    labelled = {uid for file in options.annotations for uid in read_annotations(file)}
    labelled |= {uid for file in options.series for uid in read_series(file)}
    sources = [read_weak_labels(options.weak_labels)] if options.weak_labels else []
    sources += [read_reports(options.reports)] if options.reports else []
    detector = Detector.load(options.model, options.device)
    folder = options.evidence or options.out.with_suffix(".evidence")
    known = EvidenceFile(folder / f"{detector.card.weights_fingerprint}.jsonl")
    bad: list[str] = []
    studies = {
        study.series_uid: study
        for path in options.studies
        for study in find_studies(path, lambda error: bad.append(str(error)))
    }
    if not studies.keys() - labelled:
        where = ", ".join(map(str, options.studies))
        raise InputError(where, "scans", "at least one that is not labelled", f"{len(studies)} "
                         "labelled ones")  # fmt: skip
    records = Records.merged(sources)
    weak, rejected = weak_studies(records, studies)
    bad += map(str, rejected)
    scans: list[ScanEvidence] = []
    examples: list[ScanEvidence] = []
    failed: list[tuple[str, str]] = []
    with _bar() as bar:
        task = bar.add_task("scans", total=len(studies))
        flip = STRATEGIES[options.strategy].flips
        cache = ScanCache(folder / "prepared")
        for study, found in gather(
            detector, studies.values(), told_by(records, weak), known, cache, flip=flip
        ):
            if not isinstance(found, str):
                (examples if study.series_uid in labelled else scans).append(found)
            else:
                bad.append(found)
                if study.series_uid not in labelled:
                    failed.append((study.series_uid, found))
            bar.advance(task)
    ranking = rank(options.strategy, scans, examples, failed, options.seed)
    write_ranking(options.out, ranking)
    print(f"{len(scans)} scans by {options.strategy}: {options.out}")
    for one in ranking[:3]:
        print(f"{one.rank}. {one.series_uid}: {one.why}")
    return _listed(bad)


def _listed(bad: Sequence[str]) -> int:
    """Name what could not be used; the exit code says whether there was any."""
    for line in bad:
        print(f"not used: {line}", file=sys.stderr)
    return 1 if bad else 0
