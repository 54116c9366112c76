"""From YAML files and key=value words to a checked `Config`; nothing unknown is let through.

Law: defaults < YAML < dotlist, and what is written back (`to_yaml`) loads to the same Config.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vmamba_dist.config.addresses import WHERE, is_secret, redact
from vmamba_dist.config.schema import Config, ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED = (_PACKAGE.parent / "configs", _PACKAGE / "configs")  # in a checkout; in a wheel
_BESIDE = {
    "sweep": "python launch/sweep.py and vmamba study run",
    "search": "vmamba search",
}  # groups that are no run's


def find_config(name: str) -> Path:
    """Find a config file: as a path, then in the checkout's configs/, then in the installed package's.

    Raises ConfigError listing what there is.
    """
    relative = name.removeprefix("configs/")
    candidates = [Path(name), *(folder / relative for folder in _SHIPPED)]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({str(f.relative_to(d)) for d in _SHIPPED if d.is_dir() for f in d.rglob("*.yaml")})
    raise ConfigError(f"config={name}: no such file; shipped configs: {', '.join(known) or 'none'}")


def load(args: Sequence[str], *, base: Mapping[str, Any] | None = None) -> Config:
    """Build the Config for words like `config=configs/quickstart.yaml optim.lr=1e-3`, over `base` if given.

    Raises ConfigError naming the key, the value and the fix.
    """
    return from_dict(_read(args, base or {}))


def load_beside(args: Sequence[str], group: str) -> tuple[Config, dict[str, Any]]:
    """Build the Config for words, and apart from it what they say of a group of its own, as `sweep`.

    That group's keys come flat (`{"parallel": 2, "optim.lr": [1e-3, 2e-3]}`): they may repeat a config key, whose
    value is then taken whole. Raises ConfigError as `load` does.
    """
    prefix = f"{group}."
    plain = _read([word for word in args if not word.startswith(prefix)], {})
    flat = _flat(plain.pop(group, None) or {}, group)
    for word in (word for word in args if word.startswith(prefix)):
        # One by one: beside each other, parallel=2 and parallel.engine=[…] would be a value and a group.
        flat |= _flat(_read([word], {})[group], group)
    return from_dict(plain), flat


def known_keys() -> list[str]:
    """Every key of a config, as group.key."""
    return list(_leaves(Config, ""))


def nearest_key(key: str) -> str:
    """The known key that somebody who wrote `key` may have meant, as words for a message; "" without one."""
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else ""


def _flat(values: Any, group: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{group}={values!r}: this is a group; set its keys, for example {group}.optim.lr=…"
        )
    known = set(known_keys())
    flat: dict[str, Any] = {}
    for key, value in values.items():
        parts = str(key).split(".")
        is_leaf = any(".".join(parts[i:]) in known for i in range(len(parts)))  # space.optim.lr is optim.lr's
        if is_leaf or not isinstance(value, Mapping):
            flat[str(key)] = value
            continue
        for inner, deep in value.items():
            flat |= _flat({f"{key}.{inner}": deep}, group)
    return flat


def _read(args: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
    """The nested plain values of words over `base`, not yet checked."""
    merged: Any = OmegaConf.create(dict(base))
    words: list[str] = []
    try:
        for word in args:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise ConfigError(f"{word!r} is not key=value; write for example optim.lr=1e-3")
            if key == "config":
                merged = OmegaConf.merge(merged, OmegaConf.load(find_config(value)))
            else:
                words.append(word)
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(words))
        preset = OmegaConf.select(merged, "launch.preset")
        if preset:
            merged = OmegaConf.merge(_preset(str(preset)), merged)
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"the config cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(
            f"the config is a {type(plain).__name__}; write groups of keys, as in configs/quickstart.yaml"
        )
    return {str(k): v for k, v in plain.items()}


def _preset(name: str) -> Any:
    """What a cluster's preset sets: below all that a config or a command line says. Raises ConfigError."""
    file = name if name.endswith(".yaml") else f"cluster/{name}.yaml"
    try:
        path = find_config(file)
    except ConfigError:
        known = ", ".join(
            sorted({path.stem for folder in _SHIPPED for path in folder.glob("cluster/*.yaml")})
        )
        raise ConfigError(
            f"launch.preset={name}: no such file; give a path that ends in .yaml, or one of {known or 'none'}"
        ) from None
    found = OmegaConf.load(path)
    strangers = sorted(str(key) for key in found if key != "launch")
    if strangers:
        raise ConfigError(
            f"launch.preset={name}: {path} sets {', '.join(strangers)}; a preset sets launch.* alone"
        )
    return found


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested plain values; unknown keys are errors that name the nearest known one."""
    config = _build(Config, values, "")
    assert isinstance(config, Config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (tuples as lists), fit for JSON and YAML."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert isinstance(plain, dict)
    return plain


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def trajectory(config: Config) -> dict[str, Any]:
    """The flat keys and values that decide what training computes; a resume must match them."""
    flat: dict[str, Any] = {}
    plain = to_dict(config)
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        for item in dataclasses.fields(part):
            unsaid = item.metadata.get("added", False) and getattr(part, item.name) == item.default
            if item.metadata.get("trajectory", True) and not unsaid:
                flat[f"{group.name}.{item.name}"] = plain[group.name][item.name]
    return flat


def digest(values: Mapping[str, Any]) -> str:
    """A short stable fingerprint of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(cls: type[Any], prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast("type[Any]", hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _build(cls: type[Any], values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.')}={values!r}: this is a group; set its keys, for example {_example(prefix)}"
        )
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            full = f"{prefix}{key}"
            if is_secret(str(key)):
                raise ConfigError(f"{full}: no key, and its value is not told; {WHERE}")
            if full in _BESIDE:
                raise ConfigError(f"{full}.…: this group is for {_BESIDE[full]}; leave it out here")
            candidates = known_keys() if prefix else [*hints, *known_keys()]
            near = difflib.get_close_matches(full, candidates, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; keys here: {', '.join(hints)}"
            raise ConfigError(f"{full}={redact(repr(values[key]))}: unknown key{hint}")
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = _build(typing.cast("type[Any]", hint), value, f"{prefix}{key}.")
        else:
            arguments[key] = _convert(f"{prefix}{key}", value, hint)
    return cls(**arguments)


def _build_item(cls: type[Any], item: Any, key: str) -> Any:
    """Build an item of a list, which has keys without a default."""
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(item, Mapping):
        form = ", ".join(f"{name}: …" for name in names)
        raise ConfigError(f"{key}={redact(repr(item))}: give {{{form}}}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in item:
            raise ConfigError(f"{key}.{field.name} is not set; an item has {', '.join(names)}")
    return _build(cls, item, f"{key}.")


def _example(prefix: str) -> str:
    return next((k for k in known_keys() if k.startswith(prefix)), "group.key=value")


def _convert(key: str, value: Any, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value is False and "off" in inner:
            value = "off"  # YAML 1.1 reads a bare off as false
        if value not in inner:
            raise ConfigError(f"{key}={value!r}: choose one of {', '.join(map(str, inner))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        listed = next((t for t in inner if typing.get_origin(t) is tuple), None)
        if listed is not None and isinstance(value, Sequence) and not isinstance(value, str):
            return _convert(key, value, listed)
        return _convert(key, value, next(t for t in inner if t not in (type(None), listed)))
    if origin is tuple and inner[-1] is Ellipsis:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{key}={value!r}: give a list, for example {key}=[…]")
        if dataclasses.is_dataclass(inner[0]):
            item = typing.cast("type[Any]", inner[0])
            return tuple(_build_item(item, v, f"{key}[{i}]") for i, v in enumerate(value))
        return tuple(_convert(f"{key}[{i}]", v, inner[0]) for i, v in enumerate(value))
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(inner):
            raise ConfigError(f"{key}={value!r}: give a list of {len(inner)} numbers, for example {key}=[…]")
        return tuple(_convert(f"{key}[{i}]", v, t) for i, (v, t) in enumerate(zip(value, inner, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"{key}={value!r}: give a finite number")
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        raise ConfigError(f"{key}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value
