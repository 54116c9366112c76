"""Which errors are the user's to mend: told in one line, without a traceback.

Law: nothing here loads torch.
"""

from __future__ import annotations

from vmamba_dist.checkpoint.store import CheckpointError
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.core.rundir import RunBusy, Superseded

USER_ERRORS = (ConfigError, RunBusy, Superseded, CheckpointError)
MISUSED = 2  # the exit code that goes with them
