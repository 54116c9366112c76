"""Say how far a run is: python launch/status.py runs/quickstart."""

import sys

from vmamba_dist.cli import guarded
from vmamba_dist.cluster.status import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
