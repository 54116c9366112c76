"""Say how runs are: python launch/status.py [ROOT | RUN …] [--json]; one run in a few lines, several as a table."""

import sys

from vmamba_dist.cli import script
from vmamba_dist.cluster.status import main

if __name__ == "__main__":
    sys.exit(script(main, __doc__))
