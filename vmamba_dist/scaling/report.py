"""`vmamba study report`: the study as one HTML file, as Markdown with its plots beside it, and for TensorBoard.

Law: both are rendered from the same sections, and each appears whole or not at all. Points that failed or are missing
are named, and so is the reason where there is no fit.
"""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmamba_dist.cluster.status import SWEEP
from vmamba_dist.config import ConfigError, load
from vmamba_dist.scaling import plots
from vmamba_dist.scaling.analysis import Analysis, analyse, points
from vmamba_dist.scaling.board import write_events
from vmamba_dist.scaling.fit import Array
from vmamba_dist.scaling.fitted import place, split, study_folder, whole
from vmamba_dist.scaling.laws import BOOTSTRAPS, frontier
from vmamba_dist.scaling.places import places
from vmamba_dist.scaling.planned import text as plan_text
from vmamba_dist.scaling.publish import publish
from vmamba_dist.scaling.runs import RunRecord, as_table, losses_of, read_study, recorded
from vmamba_dist.scaling.study import Study, choose_lrs, plan_study

WORDS = {
    "out": "a folder for the report; the study's own, beside its runs, where it is left out",
    "bootstraps": f"copies of the data behind the intervals ({BOOTSTRAPS})",
}
HTML, MARKDOWN, FIGURES, EVENTS, RUNS = "report.html", "report.md", "figures", "tensorboard", "runs.csv"


@dataclass(frozen=True)
class Table:
    """Rows of cells, as they are shown."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A PNG, by the name of its file."""

    name: str
    caption: str
    image: bytes


@dataclass(frozen=True)
class Listing:
    """Lines as they would stand in a terminal."""

    lines: tuple[str, ...]


Part = str | Table | Plot | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: tuple[Part, ...]


def main(words: Sequence[str]) -> int:
    """Write the report of a study."""
    own, rest = split(words, WORDS)
    if not any(word.startswith("config=") for word in rest):
        raise ConfigError("name the study: config=STUDY")
    cfg = load(rest)
    folder = place(own, "out", study_folder(cfg), "")
    assert folder is not None
    bootstraps = whole("bootstraps", own.get("bootstraps", str(BOOTSTRAPS)), least=40)
    study = plan_study(cfg)
    for path in write_report(study, rest, folder, bootstraps=bootstraps):
        print(f"written  {path}")
    return 0


def write_report(
    study: Study, words: Sequence[str], folder: Path, *, bootstraps: int = BOOTSTRAPS
) -> list[Path]:
    """Read the study's runs, fit them, and write the report below `folder`; return what was written."""
    runs = read_study(study)
    found: Analysis | None = None
    why = ""
    try:
        found = analyse(runs, bootstraps=bootstraps)
    except ConfigError as error:
        why = str(error)
    report = sections(study, runs, found, why, words)
    title = f"Scaling study {study.cfg.run.dir}"
    images = {p.name: p.image for s in report for p in s.parts if isinstance(p, Plot)}
    for name, image in images.items():
        publish(folder / FIGURES / f"{name}.png", image)
    publish(folder / RUNS, as_table(runs))
    told = markdown(title, report)
    publish(folder / MARKDOWN, told)
    publish(folder / HTML, as_html(title, report))
    write_events(folder / EVENTS, runs, found, images, told)
    return [folder / name for name in (HTML, MARKDOWN, RUNS, EVENTS)]


def sections(
    study: Study, runs: Sequence[RunRecord], found: Analysis | None, why: str, words: Sequence[str]
) -> list[Section]:
    """What the report says, in order."""
    out = [_summary(study, runs, found, why)]
    lacking = [r for r in runs if not r.finished]
    if lacking:
        rows = tuple((r.name, r.status, r.why) for r in lacking)
        out.append(Section("Points that failed or are missing", (Table(("point", "state", "why"), rows),)))
    if found is not None:
        out += [_runs_and_law(found), _isoflop(found), _frontier(found), _held_out(found), _simple(found)]
    if study.search:
        out.append(_search(study, runs))
    out += [_pace(runs), _table(runs), _plan(study), _where(study), _commands(study, runs, words)]
    return [section for section in out if section.parts]


def _summary(study: Study, runs: Sequence[RunRecord], found: Analysis | None, why: str) -> Section:
    done = sum(r.finished for r in runs)
    branched = [r for r in runs if r.branched_from]
    parts: list[Part] = [
        f"{done} of {len(runs)} runs finished: {len(study.search)} planned for the search of the learning rate, "
        f"{len(study.planned)} for the grid. Loss is the cross-entropy of the evaluation at a run's end; N is "
        "parameters without the classifier, D is samples seen, C = 6 × multiply-adds of a forward × D."
    ]
    if branched:
        shared = sum(p.flops - p.cost_flops for p in study.planned)
        parts.append(
            f"{len(branched)} runs branched from a checkpoint of the longest run of their size and seed, in the "
            f"constant phase of its schedule; all the branches that are planned save {shared:.2e} FLOPs."
        )
    if found is None:
        return Section("Summary", (*parts, f"There is no fit: {why}."))
    law, box = found.law, found.law.simultaneous
    rows = tuple((name, f"{i.value:.4g}", i.span, box[name].span) for name, i in law.estimates.items())
    seeds = f"{found.seeds:.2%} between seeds" if found.seeds is not None else "no point has two seeds"
    if found.rejected:
        parts.insert(0, f"REJECTED: {found.rejected}.")
    parts += [
        f"loss = E + A / N^alpha + B / D^beta, fitted to {len(found.used)} runs:",
        Table(("parameter", "value", "95 % interval", "95 % for all at once"), rows),
        "E is the loss that neither size nor samples lower; alpha and beta are how fast they lower the rest.",
        _best(found),
        f"Noise of a run around the law: {law.noise:.2%} ({seeds}). Huber's threshold on log residuals: "
        f"{law.delta:.2%}.",
        *(
            f"{h.run.name}, held out: {_prediction(h.run.loss or 0, h.predicted, h.error)}."
            for h in found.held_out
        ),
        *(f"{remark[0].upper()}{remark[1:]}." for remark in found.remarks() if remark != found.rejected),
        *(
            f"Outlier: {run.name} lies {residual / law.noise:+.1f} × the noise from the law; it is fitted all the same."
            for run, residual in found.outliers
        ),
    ]
    return Section("Summary", tuple(parts))


def _best(found: Analysis) -> str:
    """What to train with the most compute that a fitted run had."""
    x, _ = points(found.used)
    most = (found.work.flops(x[0]) * x[1]).max()
    front = frontier(found.law, found.work, np.array([most]))
    return (
        f"With the most compute of these runs, {most:.3g} FLOPs, the law's best size is N* {_span(front.params, 0)} "
        f"with D* {_span(front.samples, 0)}, for a loss of {_span(front.loss, 0)}; N* grows as C^{front.a}."
    )


def _prediction(loss: float, predicted: float, error: float) -> str:
    return f"loss {loss:.4f}, predicted {predicted:.4f}, off by {error:+.2%}"


def _runs_and_law(found: Analysis) -> Section:
    return Section(
        "The law and its residuals",
        (
            Plot("curves", "Loss against samples seen. Points: runs; lines: the law.", plots.curves(found)),
            Plot(
                "residuals",
                "Residuals, in the same colours; bands at one and three times the noise.",
                plots.residuals(found),
            ),
        ),
    )


def _isoflop(found: Analysis) -> Section:
    image = plots.isoflop(found)
    if image is None or found.parabola is None:
        return Section(
            "IsoFLOP curves", ("No three sizes have a like compute: there is no IsoFLOP curve to draw.",)
        )
    rows = tuple(
        (
            f"{v.flops:.3g}",
            "opens downwards" if v.params is None else f"{v.params:.4g}",
            "" if v.loss is None else f"{v.loss:.4f}",
            "yes" if v.inside else "no",
        )
        for v in found.parabola.valleys
    )
    return Section(
        "IsoFLOP curves",
        (
            Plot("isoflop", "Loss against size at like compute. Lines: the law; dots: parabolas.", image),
            Table(("C", "N* of the parabola", "loss there", "among the sizes that ran"), rows),
            "The parabola in log N is biased even without noise, by wide and by off-centre ranges of sizes (arXiv "
            f"2603.22339). Its N* ∝ C^{found.parabola.a or '?'}; the law's N* ∝ C^{found.frontier.a}.",
        ),
    )


def _frontier(found: Analysis) -> Section:
    front = found.frontier
    rows = tuple(
        (f"{front.flops[i]:.3g}", *(_span(part, i) for part in (front.params, front.samples, front.loss)))
        for i in range(0, len(front.flops), 5)
    )
    return Section(
        "Compute-optimal frontier",
        (
            Plot("frontier", "The least loss at each compute: its size and samples.", plots.frontier(found)),
            f"N* ∝ C^{front.a}, D* ∝ C^{front.b}.",
            Table(("C", "N*", "D*", "loss"), rows),
            f"Sizes and compute are tied by C = 6e9 × {found.work.gmacs:.3g} × N^{found.work.power:.3f} × D. "
            + (
                "It ends with the runs' own compute: a law that its runs reject is not extrapolated."
                if found.rejected
                else f"Rows beyond the runs' own {max(r.flops or 0 for r in found.used):.3g} FLOPs are extrapolated."
            ),
        ),
    )


def _span(part: Sequence[Array], i: int) -> str:
    value, low, high = (float(side[i]) for side in part)
    return f"{value:.4g} ({low:.4g} … {high:.4g})"


def _held_out(found: Analysis) -> Section:
    image = plots.predictions(found)
    if image is None:
        return Section("Predictions", ())
    rows = tuple(
        (
            h.run.name,
            f"{h.run.loss:.4f}",
            f"{h.predicted:.4f}",
            f"{h.low:.4f} … {h.high:.4f}",
            f"{h.error:+.2%}",
            "inside" if h.low <= (h.run.loss or 0) <= h.high else "OUTSIDE",
        )
        for h in found.held_out
    )
    return Section(
        "Predictions against held-out runs",
        (
            Plot("predictions", "Bars: 95 % for one run.", image),
            Table(("run", "loss", "predicted", "95 % for one run", "off by", "interval"), rows),
            *([_LITTLE] if found.rejected else []),
        ),
    )


_LITTLE = "Inside shows little here: the runs reject the law, and its misfit widens the interval as noise."


def _simple(found: Analysis) -> Section:
    rows = tuple(
        (
            "loss" if s.of == "loss" else "100 - top-1",
            s.against,
            ", ".join(f"{name} {value:g}" for name, value in s.fixed.items()),
            str(len(s.runs)),
            *(str(i) for i in s.law.estimates.values()),
        )
        for s in found.simple
    )
    if not rows:
        return Section("Laws along one dimension", ())
    head = ("of", "against", "with", "runs", "E", "A", "alpha")
    return Section(
        "Laws along one dimension", ("y = E + A / x^alpha, runs that agree in all else.", Table(head, rows))
    )


def _search(study: Study, runs: Sequence[RunRecord]) -> Section:
    losses = losses_of([r for r in runs if r.phase == "search"])
    rows = tuple(
        (r.model, f"{r.lr:g}" if r.lr else "", f"{r.loss:.4f}" if r.finished else r.why)
        for r in runs
        if r.phase == "search"
    )
    parts: list[Part] = [Table(("model", "lr", "loss"), rows)]
    try:
        chosen = recorded(study) or choose_lrs(study, losses)
        parts.append(
            Table(("model", "lr", "how"), tuple((k, f"{c.lr:.4g}", c.how) for k, c in chosen.items()))
        )
    except ConfigError as error:
        parts.append(f"No learning rates were chosen: {error}.")
    return Section("Search of the learning rate", tuple(parts))


def _pace(runs: Sequence[RunRecord]) -> Section:
    image = plots.pace(runs)
    if image is None:
        return Section("Pace", ())
    sized: dict[tuple[float, str], list[RunRecord]] = {}
    for run in runs:
        if run.samples_per_s:
            sized.setdefault((run.params, run.model), []).append(run)
    rows = tuple(
        (
            model,
            f"{params / 1e6:.3f}",
            _middle([r.samples_per_s for r in mine], "{:.1f}"),
            _middle([100 * r.mfu if r.mfu else None for r in mine], "{:.1f}"),
            _middle([r.memory_gib for r in mine], "{:.2f}"),
        )
        for (params, model), mine in sorted(sized.items())
    )
    head = ("model", "params, M", "samples/s", "MFU, %", "peak memory, GiB")
    return Section(
        "Throughput, MFU and memory",
        (Plot("pace", "Medians over the steps of each run.", image), Table(head, rows)),
    )


def _middle(values: Sequence[float | None], form: str) -> str:
    known = sorted(v for v in values if v)
    return form.format(known[len(known) // 2]) if known else "unknown"


def _table(runs: Sequence[RunRecord]) -> Section:
    rows = tuple(
        (
            r.name,
            f"{r.params / 1e6:.3f}",
            f"{r.samples:.0f}",
            f"{r.flops:.3g}" if r.flops else "",
            f"{r.lr:.3g}" if r.lr else "",
            f"{r.loss:.4f}" if r.loss is not None else "",
            f"{r.top1:.2f}" if r.top1 is not None else "",
            "held out" if r.held_out and r.finished else r.status,
            r.branched_from,
        )
        for r in runs
    )
    head = ("run", "params, M", "samples", "C", "lr", "loss", "top-1, %", "state", "branched from")
    return Section("Every run", (Table(head, rows),))


def _plan(study: Study) -> Section:
    return Section("The plan", (Listing(tuple(plan_text(study))),))


def _where(study: Study) -> Section:
    found = places(Path(study.cfg.run.dir), [point.name for point in study.points])
    if not found:
        return Section("Where it ran", ())
    rows = tuple(
        (
            place.machine,
            str(place.runs),
            f"{place.processes} × {place.threads}",
            f"{place.first:%Y-%m-%d %H:%M}",
            f"{place.last:%Y-%m-%d %H:%M}",
            f"{place.process_seconds:.0f}",
            place.versions,
        )
        for place in found
    )
    head = (
        "machine",
        "runs",
        "processes × threads",
        "first start, UTC",
        "last end",
        "process-seconds",
        "versions",
    )
    total, cut_off = sum(place.process_seconds for place in found), sum(place.cut_off for place in found)
    told = (
        f"{sum(place.runs for place in found)} runs took {total:.0f} process-seconds, {total / 3600:.2f} hours, from "
        "the beginning of each run's last start to its end, evaluation and saving included"
    )
    if cut_off:
        told += f"; {cut_off} earlier starts of them were cut off, and their time is not counted"
    return Section("Where it ran", (f"{told}.", Table(head, rows)))


def _data(study: Study) -> Iterator[str]:
    """The command that makes the data, where its index says that anyone can."""
    train, split = study.cfg.data.train, study.cfg.data.split
    if not isinstance(train, str):
        return
    try:
        info = json.loads((Path(train) / "_info.json").read_text(encoding="utf-8"))
        made = info["fractal"]
        counts = {name: int(entry["num_samples"]) for name, entry in info["splits"].items()}
        each = {"classes": made["classes"], "per_class": counts[split] // made["classes"]}
        each["test_per_class"] = counts.get("test", 0) // made["classes"]
    except (OSError, ValueError, KeyError, TypeError):  # no index here, or not of fractals
        return
    yield shlex.join(["vmamba", "shards", "fractal", train, *(f"{k}={v}" for k, v in (each | made).items())])


def _ran_as(study: Study, own: str) -> str:
    """The command that ran the study, as the sweep has it, with sweep.parallel; else one that would.

    The sweep's is for a shell of that machine, and names the program by its place there; a report goes elsewhere.
    """
    try:
        found = json.loads((Path(study.cfg.run.dir) / SWEEP).read_text(encoding="utf-8"))["command"]
        words = shlex.split(str(found))
        return shlex.join(["vmamba", *words[words.index("study") :]])
    except (OSError, ValueError, KeyError, TypeError):  # no sweep here, or its record is torn
        return f"vmamba study run {own}"


def _commands(study: Study, runs: Sequence[RunRecord], words: Sequence[str]) -> Section:
    own = shlex.join(words)
    lines = [
        *_data(study),
        f"vmamba study plan {own}",
        _ran_as(study, own),
        f"vmamba study fit {own}",
        f"vmamba study report {own}",
    ]
    by_name = {r.name: r for r in runs}
    each = []
    for point in study.points:
        lr = by_name[point.name].lr
        if point.phase == "grid" and (lr is None or by_name[point.name].status == "foreign"):
            continue  # never started as a run of this study: its learning rate is known when the search has ended
        more = [f"optim.lr={lr:.6g}"] if point.phase == "grid" else []
        started = by_name[point.name].branched_from and point.branch_from
        if started:
            more.append(started.word(study.cfg.run.dir))
        each.append(shlex.join(["vmamba", "train", *words, *point.words, *more]))
    return Section(
        "Commands",
        (
            "The study:",
            Listing(tuple(lines)),
            "Each run of the search, and each of the grid that has started, by itself:",
            Listing(tuple(each)),
        ),
    )


# Rendering


def markdown(title: str, report: Sequence[Section]) -> str:
    """The report as Markdown; its plots lie in figures/."""
    lines = [f"# {title}", ""]
    for section in report:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            lines += [*_markdown(part), ""]
    return "\n".join(lines)


def _markdown(part: Part) -> Iterator[str]:
    match part:
        case str():
            yield part
        case Table(head, rows):
            yield f"| {' | '.join(head)} |"
            yield "|" + "---|" * len(head)
            for row in rows:
                yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        case Plot(name, caption, _):
            yield f"![{caption}]({FIGURES}/{name}.png)"
            yield ""
            yield caption
        case Listing(lines):
            yield "```"
            yield from lines
            yield "```"


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left;white-space:nowrap}
img{max-width:100%}figcaption{font-size:13px;color:#555}pre{background:#f6f6f6;padding:.8em;overflow-x:auto;font-size:12px}"""


def as_html(title: str, report: Sequence[Section]) -> str:
    """The report as one HTML file that needs nothing else."""
    body = "".join(
        f"<h2>{html.escape(section.title)}</h2>{''.join(_html(part) for part in section.parts)}\n"
        for section in report
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n"
    )


def _html(part: Part) -> str:
    match part:
        case str():
            return f"<p>{html.escape(part)}</p>"
        case Table(head, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            rest = "".join(
                f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
            )
            return f"<table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table>"
        case Plot(_, caption, image):
            data = base64.b64encode(image).decode()
            told = html.escape(caption)
            shown = f'<img alt="{told}" src="data:image/png;base64,{data}">'
            return f"<figure>{shown}<figcaption>{told}</figcaption></figure>"
        case Listing(lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
