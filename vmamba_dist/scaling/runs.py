"""What runs have come to, read from their directories or from a table: one record a run.

Law: every run that was planned or given has a record, and a record that is not finished says why: nothing is left out
in silence. A run may be going on meanwhile; a torn last line of metrics.jsonl is not read. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from vmamba_dist.cluster.status import stopped_for
from vmamba_dist.config import Config, ConfigError, from_dict, to_dict, trajectory
from vmamba_dist.core.rundir import last_attempt
from vmamba_dist.models import flops
from vmamba_dist.models.variants import configured, describe
from vmamba_dist.scaling.study import Choice, Point, Study, choose_lrs, classes_of

Status = Literal["finished", "diverged", "failed", "unfinished", "missing", "foreign"]
LRS = "lrs.json"  # in a study's folder
_REQUEUE = 75  # the exit code of a run that was stopped, saved, and goes on by the same command
REQUIRED = ("params", "samples", "loss")
OPTIONAL = ("gmacs", "top1", "resolution", "width", "depth")
FEW = 300  # samples a class, below which losses are of a transition
_WARM = 5  # steps at a start whose pace is not the run's


@dataclass(frozen=True)
class RunRecord:
    """One run. Numbers that are not known are None."""

    name: str
    status: Status
    why: str  # "" where finished
    params: float  # without the classifier
    samples: float  # of its budget
    loss: float | None  # of the last evaluation, cross-entropy
    gmacs: float | None = None  # multiply-adds of a sample's forward, in 1e9
    top1: float | None = None  # %
    resolution: float | None = None  # px
    classes: int | None = None
    width: float | None = None  # of the first stage
    depth: float | None = None  # blocks
    model: str = ""
    seed: int | None = None
    lr: float | None = None  # optim.lr: at optim.lr_batch
    batch: int | None = None
    held_out: bool = False
    phase: str = "grid"
    branched_from: str = ""  # point and step
    samples_per_s: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def flops(self) -> float | None:
        """Training FLOPs that the model has seen."""
        return None if self.gmacs is None else 6e9 * self.gmacs * self.samples


def read_study(study: Study) -> list[RunRecord]:
    """A record of every point of a study, the search's first; a point without a run directory is missing."""
    try:
        chosen = recorded(study) if study.search else choose_lrs(study, {})
    except ConfigError:  # of another search: whoever asks for the learning rates is told
        chosen = None
    grid = study.grid({label: choice.lr for label, choice in chosen.items()}) if chosen else study.planned
    return [read_point(point, study.cfg) for point in (*study.search, *grid)]


def read_point(point: Point, study: Config) -> RunRecord:
    """The record of one point below the folder of a study with this config.

    A run directory that was trained with another config is foreign: it is no run of this study, whatever it came to.
    """
    root = Path(study.run.dir)
    path = root / point.name
    branch = point.branch_from
    end = _bad_end(root, point.name)
    facts: dict[str, Any] = {
        "held_out": point.rung.held_out,
        "phase": point.phase,
        "model": point.rung.label,
        "seed": point.seed,
        "batch": point.rung.batch,
    }
    if not (path / "config.yaml").is_file():
        variant = configured(point.rung.model)
        return RunRecord(
            point.name,
            "failed" if end else "missing",
            end or "never started",
            float(point.rung.params),
            float(point.samples),
            None,
            point.rung.macs / 1e9,
            width=float(variant.dims[0]),
            depth=float(variant.num_blocks),
            **facts,
        )
    found = read_run(path)
    changed = _changed(path, point, study)
    if changed:
        why = f"no run of this study, trained with another config: {'; '.join(changed)}"
        return replace(found, name=point.name, status="foreign", why=why, phase=point.phase)
    first = _first_step(path)
    if branch is not None and first is not None and first == branch.step + 1:
        facts["branched_from"] = f"{branch.point} at step {branch.step}"
    if end and found.status == "unfinished":
        facts |= {"status": "failed", "why": f"{end}; {found.why}"}
    return replace(found, name=point.name, **facts)


def _changed(path: Path, point: Point, study: Config) -> list[str]:
    """What decides training and differs between a run's config and its point's, as the sweep compares them."""
    if study.run.allow_changes:
        return []
    planned = _planned(point, study)
    was, now = trajectory(_config(path / "config.yaml")), trajectory(planned)
    if not any(word.startswith("optim.lr=") for word in point.words):
        was["optim.lr"] = now["optim.lr"]  # not chosen yet
    return [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _planned(point: Point, study: Config) -> Config:
    """The config that a point's words make of a study's, as `load` would; its words are numbers, lists and names.

    Without the reader of users' words, which takes ten times as long: a report reads hundreds of points.
    """
    plain = to_dict(study)
    for word in point.words:
        key, _, text = word.partition("=")
        group, _, name = key.partition(".")
        try:
            plain[group][name] = json.loads(text)
        except ValueError:
            plain[group][name] = text
    return from_dict(plain)


def recorded(study: Study) -> dict[str, Choice] | None:
    """Each rung's learning rate as the grid has it; None before it is chosen.

    Raises ConfigError where the record is of another search.
    """
    file = Path(study.cfg.run.dir) / LRS
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    found = {label: Choice(**choice) for label, choice in record["chosen"].items()}
    if record["search"] != tried(study) or set(found) != {rung.label for rung in study.rungs}:
        raise ConfigError(
            f"{file} holds the learning rates of another search or ladder; take another run.dir, or remove the "
            "file and the runs of the grid"
        )
    return found


def tried(study: Study) -> list[str]:
    """The names of the search's runs, by which a record of it is known."""
    return sorted(point.name for point in study.search)


def _bad_end(root: Path, name: str) -> str:
    """How a point's last start ended: here by the sweep's record of it, on Slurm, where there is none, by its ledger.

    "" where it ended well or nothing is known.
    """
    try:
        end = json.loads((root / "points" / f"{name}.json").read_text(encoding="utf-8"))
        return "" if end["exit_code"] in (0, _REQUEUE) else f"exit code {end['exit_code']}: {end['reason']}"
    except FileNotFoundError:
        return stopped_for(root / name, last_attempt(root / name))
    except (ValueError, KeyError, TypeError) as error:
        return f"the record of its last start cannot be read ({error!r})"


def read_run(path: Path) -> RunRecord:
    """The record of one run directory. Raises ConfigError where it holds no run."""
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: no config.yaml in it, so no run directory")
    cfg = _config(path / "config.yaml")
    variant, side, classes = configured(cfg.model), cfg.data.image_size, classes_of(cfg)
    lines = _lines(path / "metrics.jsonl")
    last = lines[-1] if lines else {}
    weights = cfg.eval.weights if cfg.ema.enabled else "raw"
    loss, top1 = (last.get(f"eval/{weights}/{key}") for key in ("loss", "top1"))
    done = int(last.get("samples", 0))
    budget = cfg.schedule.samples
    if budget is not None:
        budget = budget // cfg.data.global_batch * cfg.data.global_batch
    status, why = _status(last, f"eval/{weights}/loss", loss, done, budget, classes)
    paced = lines[_WARM:] or lines
    return RunRecord(
        name=path.name,
        status=status,
        why=why,
        params=float(flops.params(variant, 0)),
        samples=float(budget or done),
        loss=loss,
        gmacs=flops.macs(variant, side, side, classes) / 1e9,
        top1=top1,
        resolution=float(side),
        classes=classes,
        width=float(variant.dims[0]),
        depth=float(variant.num_blocks),
        model=describe(cfg.model),
        seed=cfg.run.seed,
        lr=cfg.optim.lr,
        batch=cfg.data.global_batch,
        samples_per_s=_median(paced, "samples_per_s"),
        mfu=_median(paced, "mfu"),
        memory_gib=max((line["memory_gib"] for line in lines if line.get("memory_gib")), default=None),
    )


def _config(path: Path) -> Config:
    """The config that a run wrote. libyaml reads it thirty times faster than the reader of users' files does."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no config")
    return from_dict(values)


def _status(
    last: Mapping[str, Any], key: str, loss: float | None, done: int, budget: int | None, classes: int
) -> tuple[Status, str]:
    if not last:
        return "unfinished", "no step was taken"
    if last.get("loss") is None:
        return "diverged", f"the loss of step {last.get('step')}, its last, is not finite"
    if budget is not None and done < budget:
        return "unfinished", f"{done} of {budget} samples"
    if key not in last:
        return "unfinished", f"no evaluation at its last step, {last.get('step')}"
    if loss is None:
        return "diverged", "the loss of its evaluation is not finite"
    if loss >= math.log(classes):
        return "diverged", f"its loss of {loss:.3f} is no better than guessing among {classes} classes"
    return "finished", ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
    return found


def _first_step(path: Path) -> int | None:
    try:
        with (path / "metrics.jsonl").open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    return int(json.loads(line)["step"]) if line.endswith(b"\n") else None


def _median(lines: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key)]
    return statistics.median(values) if values else None


def read_table(path: Path) -> list[RunRecord]:
    """Runs from a CSV with columns params, samples, loss, and those of OPTIONAL, name and status where given.

    A status other than finished, or none, keeps a run out of the fit and in the list of those left out. Raises
    ConfigError naming the line, the column and the fix.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"table={path}: cannot be read as CSV ({error})") from error
    lacking = [name for name in REQUIRED if name not in columns]
    if lacking:
        raise ConfigError(
            f"table={path} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; its header is "
            f"{', '.join(columns) or 'empty'}"
        )
    return [_row(row, number, path) for number, row in enumerate(rows, 2)]


def _row(row: Mapping[str, str | None], number: int, path: Path) -> RunRecord:
    name = (row.get("name") or "").strip() or f"line {number}"
    told = (row.get("status") or "").strip().lower() or "finished"
    values: dict[str, float | None] = {}
    for column in (*REQUIRED, *OPTIONAL):
        text = (row.get(column) or "").strip()
        if not text and (column in OPTIONAL or told != "finished"):
            values[column] = None
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if told != "finished" and column == "loss" and not math.isfinite(value):
            values[column] = None
            continue
        positive = value > 0 or (column == "top1" and value == 0)
        if not (math.isfinite(value) and positive):
            raise ConfigError(
                f"table={path}, line {number}: {column}={text or 'nothing'} is not a finite number above 0; mend it, "
                "or give the table a column status with diverged in this line, and the run is listed and not fitted"
            )
        values[column] = value
    return RunRecord(
        name,
        "finished" if told == "finished" else "diverged" if told == "diverged" else "unfinished",
        "" if told == "finished" else f"the table says {told}",
        values["params"] or math.nan,
        values["samples"] or math.nan,
        values["loss"],
        gmacs=values["gmacs"],
        top1=values["top1"],
        resolution=values["resolution"],
        width=values["width"],
        depth=values["depth"],
    )


def as_table(runs: Sequence[RunRecord]) -> str:
    """Runs as `read_table` takes them: those that a fit leaves out have a status that says why."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*REQUIRED, *OPTIONAL, "name", "status"])
    for run in runs:
        status = run.status if not run.finished else "finished" if run.phase == "grid" else run.phase
        told = "held out" if run.held_out and status == "finished" else status
        values = [getattr(run, column) for column in (*REQUIRED, *OPTIONAL)]
        writer.writerow(["" if value is None else f"{value:.10g}" for value in values] + [run.name, told])
    return out.getvalue()


def losses_of(records: Sequence[RunRecord]) -> dict[str, float]:
    """Losses of the finished ones, by name: what `choose_lrs` takes."""
    return {r.name: r.loss for r in records if r.finished and r.loss is not None}
