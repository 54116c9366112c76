"""Start a run as a job: python launch/submit.py config=configs/quickstart.yaml [key=value …] [--dry-run] [--follow]."""

import sys

from vmamba_dist.cli import guarded
from vmamba_dist.scaling.submit import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
