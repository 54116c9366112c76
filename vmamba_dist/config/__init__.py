"""What can be configured, and how it is read."""

from vmamba_dist.config.load import (
    digest,
    find_config,
    from_dict,
    known_keys,
    load,
    load_beside,
    nearest_key,
    to_dict,
    to_yaml,
    trajectory,
)
from vmamba_dist.config.schema import Config, ConfigError, UserError

__all__ = [
    "Config",
    "ConfigError",
    "UserError",
    "digest",
    "find_config",
    "from_dict",
    "known_keys",
    "load",
    "load_beside",
    "nearest_key",
    "to_dict",
    "to_yaml",
    "trajectory",
]
