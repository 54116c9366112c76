"""Start a run as a job: python launch/submit.py config=configs/quickstart.yaml [key=value …] [--dry-run] [--follow]."""

import sys

from vmamba_dist.cli import script
from vmamba_dist.scaling.submit import main

if __name__ == "__main__":
    sys.exit(script(main, __doc__))
