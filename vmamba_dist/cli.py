"""The `vmamba` command: one table from verb to function; the work is done in the rooms.

Law: nothing heavy is imported before the verb is known. A user's mistake is one line and exit code 2;
anything else keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmamba_dist.config.schema import ConfigError, UserError

MISUSED = 2  # a user's mistake, told in one line


@dataclass(frozen=True)
class Verb:
    """Where a verb's function lives (`module:function`, taking words and returning an exit code)."""

    target: str
    usage: str
    summary: str
    own_help: bool = False  # the function answers --help itself

    def load(self) -> Callable[[Sequence[str]], int]:
        module, _, name = self.target.partition(":")
        function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
        return function


VERBS = {
    "train": Verb(
        "vmamba_dist.cluster.local:main",
        "config=FILE [key=value …]",
        "train on this machine, with launch.tasks_per_node processes",
    ),
    "submit": Verb(
        "vmamba_dist.scaling.submit:main",
        "config=FILE [key=value …] [--dry-run] [--follow]",
        "start the same run as a job, here and shown, or on Slurm",
    ),
    "eval": Verb(
        "vmamba_dist.train.evaluate:main",
        "eval.checkpoint=RUN_OR_CHECKPOINT eval.data=SHARDS [key=value …]",
        "top-1, top-5 and loss of a checkpoint, every sample once",
    ),
    "shards": Verb(
        "vmamba_dist.data.command:main",
        "pack | fractal | verify | show …",
        "make and check WebDataset shards",
        own_help=True,
    ),
    "checkpoints": Verb(
        "vmamba_dist.checkpoint.command:main",
        "list | verify | show …",
        "what a run has saved, and whether it is whole",
        own_help=True,
    ),
    "convert": Verb(
        "vmamba_dist.checkpoint.convert:main",
        "FROM TO [--weights raw|ema] [--format …] [--model NAME]",
        "checkpoints to and from safetensors, official weights, DeepSpeed",
        own_help=True,
    ),
    "plan": Verb(
        "vmamba_dist.scaling.command:main",
        "config=FILE gpus=N gpu=KIND [node=N] [network=GB/s] [samples=N] [price=PER_GPU_HOUR] [key=value …]",
        "memory, time and cost of a run before it is paid for, and the micro-batch that fits",
    ),
    "runs": Verb(
        "vmamba_dist.cluster.status:main",
        "[ROOT | RUN …] [--json]",
        "how runs are: state, step, loss, speed, last checkpoint, starts",
    ),
    "study": Verb(
        "vmamba_dist.scaling.verbs:main",
        "plan | run | fit | report | predict …",
        "scaling studies: what they cost, the law that their runs follow, what it predicts",
        own_help=True,
    ),
    "search": Verb(
        "vmamba_dist.cluster.search:main",
        "config=FILE search.space.KEY=SPACE … [search.method=random|halving] [search.trials=N] [key=value …]",
        "search hyper-parameters, at random or by successive halving",
    ),
    "doctor": Verb(
        "vmamba_dist.doctor:main",
        "",
        "what this machine can do, and how to get what is missing",
    ),
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(["usage: vmamba VERB …", "", *lines, "", "vmamba VERB --help says what a verb takes."])


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; user errors propagate."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else MISUSED
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise ConfigError(f"vmamba {name}: no such verb; {hint}")
    verb = VERBS[name]
    if verb.own_help or not {"-h", "--help"} & set(rest):
        return verb.load()(rest)
    print(f"usage: vmamba {name} {verb.usage}\n\n{verb.summary}")
    return 0


def guarded(function: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Call a command's function; tell the user's own mistakes in one line."""
    try:
        return function(words)
    except UserError as error:
        print(f"vmamba: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def script(function: Callable[[Sequence[str]], int], usage: str | None) -> int:
    """Call a command's function with this process's words, as a script does; --help prints `usage`."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(usage)
        return 0
    return guarded(function, words)


def main() -> int:
    return guarded(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
