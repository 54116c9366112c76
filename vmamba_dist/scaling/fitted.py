"""`vmamba study fit`: a law of runs, from a study's run directories or from any table.

Law: `out` holds the parameters and nothing else; all that they rest on is in `details`. Both appear whole or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from vmamba_dist.config import Config, ConfigError, load
from vmamba_dist.scaling.analysis import (
    Analysis,
    Dimension,
    Measure,
    SimpleLaw,
    analyse,
    details,
    simple_laws,
    simple_plain,
)
from vmamba_dist.scaling.laws import BOOTSTRAPS, Interval, plain
from vmamba_dist.scaling.publish import publish_json
from vmamba_dist.scaling.runs import RunRecord, read_study, read_table
from vmamba_dist.scaling.study import plan_study

# Words of the verb, and what each stands for.
WORDS = {
    "table": "a CSV with columns params, samples, loss (gmacs, top1, resolution, width, depth, name, status)",
    "out": "where the parameters go, as JSON",
    "details": "where all that they rest on goes, as JSON",
    "bootstraps": f"copies of the data behind the intervals ({BOOTSTRAPS})",
    "delta": "Huber's threshold on log residuals (1.5 × the noise)",
    "of": "loss, or top1",
    "against": "a law along one dimension: samples, params, resolution, width or depth",
}
FIT, DETAILS = "fit.json", "details.json"


def main(words: Sequence[str]) -> int:
    """Fit, print, and write what was asked for."""
    own, rest = split(words, WORDS)
    records, cfg = _records(own, rest)
    bootstraps = whole("bootstraps", own.get("bootstraps", str(BOOTSTRAPS)), least=40)
    if "against" in own:
        return _along(own, records, bootstraps)
    if own.get("of", "loss") != "loss":
        raise ConfigError("of=top1 needs against=samples, params, resolution, width or depth")
    delta = positive("delta", own["delta"]) if "delta" in own else None
    found = analyse(records, bootstraps=bootstraps, delta=delta)
    folder = study_folder(cfg) if cfg is not None else None
    out, full = place(own, "out", folder, FIT), place(own, "details", folder, DETAILS)
    if full is not None:
        publish_json(full, details(found))
    if out is not None:
        publish_json(out, plain(found.law))
    print("\n".join(text(found)))
    for path in filter(None, (out, full)):
        print(f"written  {path}")
    return 0


def _records(own: Mapping[str, str], rest: Sequence[str]) -> tuple[list[RunRecord], Config | None]:
    if "table" in own:
        if rest:
            raise ConfigError(f"{rest[0]}: beside table=… the words are {', '.join(WORDS)}")
        return read_table(Path(own["table"])), None
    if not any(word.startswith("config=") for word in rest):
        raise ConfigError("name the runs: config=STUDY for a study's, or table=RUNS.csv")
    cfg = load(rest)
    return read_study(plan_study(cfg)), cfg


def _along(own: Mapping[str, str], records: Sequence[RunRecord], bootstraps: int) -> int:
    against, of = own["against"], own.get("of", "loss")
    unread = next((word for word in ("details", "delta") if word in own), None)
    if unread is not None:
        raise ConfigError(f"{unread}={own[unread]}: not taken beside against=…; leave it out")
    if against not in get_args(Dimension):
        raise ConfigError(f"against={against}: choose one of {', '.join(get_args(Dimension))}")
    if of not in get_args(Measure):
        raise ConfigError(f"of={of}: choose one of {', '.join(get_args(Measure))}")
    used = [r for r in records if r.finished and r.phase == "grid"]
    found = simple_laws(used, cast(Measure, of), cast(Dimension, against), bootstraps=bootstraps)
    if not found:
        raise ConfigError(
            f"against={against}: no four runs with different {against} agree in all else, so there is no law to fit"
        )
    for law in found:
        print("\n".join(simple_text(law)))
    left_out = [r for r in records if not r.finished]
    for run in left_out:
        print(f"left out {run.name}: {run.why}")
    if "out" in own:
        publish_json(Path(own["out"]), {"laws": [simple_plain(law) for law in found]})
        print(f"written  {own['out']}")
    return 0


def text(found: Analysis) -> list[str]:
    """Return a fit for people, as lines."""
    led = [f"REJECTED: {found.rejected}", ""] if found.rejected else []
    return [*led, *_law(found), *_frontier(found), *_predictions(found), *_left(found), *_remarks(found)]


def _law(found: Analysis) -> Iterator[str]:
    law = found.law
    yield f"loss = E + A / params^alpha + B / samples^beta, of {len(found.used)} runs"
    yield f"{'':<8}{'value':>11}   95 % interval              95 % for all at once"
    for (name, own), (_, all_) in zip(law.estimates.items(), law.simultaneous.items(), strict=True):
        one, box = (_bounds(i) for i in (own, all_))
        yield f"{name:<8}{own.value:>11.4g}  {one}   {box}"
    yield (
        f"noise    {law.noise:.2%} of a run's loss around the law; "
        + (f"{found.seeds:.2%} between seeds" if found.seeds is not None else "no point has two seeds")
        + f"; Huber's threshold {law.delta:.2%}"
    )


def _bounds(interval: Interval) -> str:
    low, dots, high = interval.span.partition(" … ")
    return f"{low:>10} … {high:<10}" if dots else f"{low:^23}"


def _frontier(found: Analysis) -> Iterator[str]:
    front, work = found.frontier, found.work
    yield f"frontier params* ∝ C^{front.a}, samples* ∝ C^{front.b}"
    yield f"         C = 6e9 × {work.gmacs:.3g} × params^{work.power:.3f} × samples"
    for i in range(0, len(front.flops), 10):
        n, d, loss = (
            (part[0][i], part[1][i], part[2][i]) for part in (front.params, front.samples, front.loss)
        )
        yield (
            f"         C {front.flops[i]:.2e}  params* {_span(n)}  samples* {_span(d)}  loss {loss[0]:.4g} "
            f"({loss[1]:.4g} … {loss[2]:.4g})"
        )
    if found.parabola is not None:
        yield (
            f"parabola params* ∝ C^{found.parabola.a or '?: too few levels have a lowest point'}  (IsoFLOP, biased: "
            "arXiv 2603.22339)"
        )
        for valley in found.parabola.valleys:
            at = (
                "opens downwards"
                if valley.params is None
                else f"params* {valley.params:.3g}, loss {valley.loss:.4g}"
            )
            outside = valley.params is not None and not valley.inside
            yield f"         C {valley.flops:.2e}  {at}{', outside of the sizes that ran' * outside}"


def _span(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.3g} ({values[1]:.3g} … {values[2]:.3g})"


def _predictions(found: Analysis) -> Iterator[str]:
    for h in found.held_out:
        inside = "inside" if h.low <= (h.run.loss or math.nan) <= h.high else "outside of"
        little = ", which shows little: the law is rejected" if found.rejected and inside == "inside" else ""
        yield (
            f"held out {h.run.name}: loss {h.run.loss:.4f}, predicted {h.predicted:.4f} ({h.low:.4f} … {h.high:.4f}), "
            f"off by {h.error:+.2%}, {inside} its interval{little}"
        )


def _left(found: Analysis) -> Iterator[str]:
    for run, residual in found.outliers:
        yield f"outlier  {run.name}: {residual / found.law.noise:+.1f} × the noise from the law; fitted all the same"
    for run in found.left_out:
        yield f"left out {run.name}: {run.status}, {run.why}"


def _remarks(found: Analysis) -> Iterator[str]:
    for remark in found.remarks():
        if remark != found.rejected:  # which stands at the top
            yield f"note     {remark}"


def simple_text(found: SimpleLaw) -> Iterator[str]:
    fixed = ", ".join(f"{name} {value:g}" for name, value in found.fixed.items())
    yield (
        f"{'loss' if found.of == 'loss' else '100 - top1'} = E + A / {found.against}^alpha, of {len(found.runs)} runs"
        + (f" with {fixed}" if fixed else "")
    )
    for name, interval in found.law.estimates.items():
        yield f"  {name:<6} {interval}"


# The words of a command line, for every sub-verb that has some of its own


def split(words: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The words that a verb has of its own, and the config's. Raises ConfigError for one without a value."""
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if key in known:
            if not equals or not value:
                raise ConfigError(f"{word}: give it a value, {key}=…: {known[key]}")
            own[key] = value
        else:
            rest.append(word)
    return own, rest


def study_folder(cfg: Config) -> Path:
    """Where a study's results lie, beside its runs."""
    return Path(cfg.run.dir) / "study"


def place(own: Mapping[str, str], word: str, folder: Path | None, name: str) -> Path | None:
    """Where a result goes: as told, else into the study's folder."""
    if word in own:
        return Path(own[word])
    return None if folder is None else folder / name


def whole(word: str, value: str, *, least: int = 1) -> int:
    if not value.isdigit() or int(value) < least:
        raise ConfigError(f"{word}={value}: use a whole number of {least} or more")
    return int(value)


def positive(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ConfigError(f"{word}={value}: use a number above 0")
    return number
