"""Run many points: python launch/sweep.py config=configs/quickstart.yaml sweep.optim.lr=[1e-3,4e-3] [--dry-run]."""

import sys

from vmamba_dist.cli import guarded
from vmamba_dist.cluster.sweep import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
