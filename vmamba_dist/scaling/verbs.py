"""`vmamba study`: one table from sub-verb to function.

Law: nothing that a sub-verb does not need is imported: a plan loads no scipy, only a report loads matplotlib.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmamba_dist.config.schema import ConfigError


@dataclass(frozen=True)
class SubVerb:
    """Where a sub-verb's function lives (`module:function`, taking words and returning an exit code)."""

    target: str
    usage: str
    summary: str

    def load(self) -> Callable[[Sequence[str]], int]:
        module, _, name = self.target.partition(":")
        try:
            function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise ConfigError("plots need matplotlib: pip install 'vmamba-dist[study]'") from error
        return function


SUB_VERBS = {
    "plan": SubVerb(
        "vmamba_dist.scaling.planned:main",
        "config=STUDY [key=value …]",
        "points, costs and the total, before anything runs",
    ),
    "run": SubVerb(
        "vmamba_dist.scaling.running:main",
        "config=STUDY [sweep.parallel=N] [key=value …]",
        "its points, here or as a Slurm array; again to go on",
    ),
    "fit": SubVerb(
        "vmamba_dist.scaling.fitted:main",
        "config=STUDY [key=value …] | table=RUNS.csv   [out=FIT.json] [details=FILE.json] [bootstraps=N] [delta=X]\n"
        "                        [of=loss|top1 against=samples|params|resolution|width|depth]",
        "loss as a law of parameters and samples, with intervals; of a study's runs or of any table",
    ),
    "report": SubVerb(
        "vmamba_dist.scaling.report:main",
        "config=STUDY [key=value …] [out=FOLDER] [bootstraps=N]",
        "the study as one HTML file and as Markdown, with plots, tables and commands; and for TensorBoard",
    ),
    "predict": SubVerb(
        "vmamba_dist.scaling.predicted:main",
        "model=NAME samples=N config=STUDY | fit=DETAILS.json [gpu=KIND] [gpus=N] [width=N] [image_size=PX] [batch=N]",
        "the loss of a run that nobody has made, its interval, its GPU-hours, and whether the law reaches that far",
    ),
}


def usage() -> str:
    width = max(map(len, SUB_VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in SUB_VERBS.items()]
    return "\n".join(
        ["usage: vmamba study VERB …", "", *lines, "", "vmamba study VERB --help says what a verb takes."]
    )


def main(words: Sequence[str]) -> int:
    """Run one study command and return its exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        # As argparse ends it: the command line relies on one way.
        sys.exit(0 if words else 2)
    name, *rest = words
    if name not in SUB_VERBS:
        near = difflib.get_close_matches(name, SUB_VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUB_VERBS)}"
        raise ConfigError(f"vmamba study {name}: no such verb; {hint}")
    verb = SUB_VERBS[name]
    if {"-h", "--help"} & set(rest):
        print(f"usage: vmamba study {name} {verb.usage}\n\n{verb.summary}")
        return 0
    return verb.load()(rest)
