"""Run many points: python launch/sweep.py config=FILE sweep.KEY=[VALUE,…] … [--dry-run] [--follow]; docs/sweeps.md."""

import sys

from vmamba_dist.cli import script
from vmamba_dist.cluster.sweep import main

if __name__ == "__main__":
    sys.exit(script(main, __doc__))
