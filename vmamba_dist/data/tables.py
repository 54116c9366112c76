"""Arrow tables: Parquet lists, and datasets of Hugging Face's `datasets` as it saves them to disk.

Law: pyarrow alone reads both: nothing is unpickled and no dataset script runs. A saved dataset is Arrow streams
and two JSON files, and the package `datasets` would bring pandas, a client for the Hub and `dill` along for
them. Every table is validated in full before an offset in it is followed. What a table names stays in its folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.index import MAX_CLASSES
from vmamba_dist.data.origins import Content, Keys, Row, check_columns, from_rows, stamp_of
from vmamba_dist.data.sources import Fault

_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError)


def from_parquet(path: Path, image_column: str | None, label_column: str | None) -> Content:
    """List the images that a Parquet file names. Raises ConfigError naming file, row and fix."""
    columns = [image_column or "path", label_column or "label"]
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(path, columns, names)
            wanted = [*columns, *(name for name in ("split",) if name in names)]
            table = file.read(columns=wanted, use_threads=False)  # no thread lives when processes are forked
        table.validate(full=True)
        if any(pa.types.is_nested(kind) or pa.types.is_binary(kind) for kind in table.schema.types):
            raise ConfigError(
                f"{path}: {' and '.join(columns)} hold {table.schema.types[0]} and {table.schema.types[1]}, not "
                "text or numbers; images inside Parquet are packed with datasets: load it, save_to_disk, pack that"
            )
        values = [[_text(value) for value in table.column(name).to_pylist()] for name in wanted]
    except ConfigError:
        raise
    except _ERRORS as error:
        raise ConfigError(f"{path} is not a Parquet file that can be read: {error}") from error
    splits = values[2] if len(values) > 2 else [""] * len(values[0])
    rows = [
        Row(f"row {i}", *fields) for i, fields in enumerate(zip(values[0], values[1], splits, strict=True))
    ]
    return from_rows(path, rows)


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def from_saved_dataset(root: Path, image_column: str | None, label_column: str | None) -> Content:
    """List a dataset that `datasets` saved to disk; splits and class names are its own.

    Raises ConfigError where it is damaged, or where it is not clear which columns hold image and label.
    """
    try:
        return _saved_dataset(root, image_column, label_column)
    except ConfigError:
        raise
    except _ERRORS as error:
        raise ConfigError(f"{root} is not a dataset that can be read: {error!r}") from error


def _saved_dataset(root: Path, image_column: str | None, label_column: str | None) -> Content:
    parts = {"": root}
    if (root / "dataset_dict.json").is_file():
        names = _json(root / "dataset_dict.json")["splits"]
        wrong = [
            name for name in names if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]+", name))
        ]
        if wrong or not names:
            raise ConfigError(f"{root}: splits {names!r}: use names of letters, digits and _")
        parts = {name: root / name for name in names}
    images: list[pa.ChunkedArray] = []
    labels: list[int] = []
    splits: list[str] = []
    keys: list[str] = []
    classes: tuple[str, ...] = ()
    files: list[Path] = []
    for split, folder in parts.items():
        features = _json(folder / "dataset_info.json")["features"]
        image, label = _columns(folder, features, image_column, label_column)
        own = tuple(str(name) for name in features[label].get("names") or ())
        if split != next(iter(parts)) and own != classes:
            raise ConfigError(f"{root}: its splits have different classes")
        classes = own
        state = _json(folder / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ConfigError(f"{folder} keeps an order beside its data; save it with a current datasets")
        for name in [str(entry["filename"]) for entry in state["_data_files"]]:
            if not _plain(name):
                raise ConfigError(f"{folder}: names files outside its folder")
            files.append(folder / name)
            with pa.memory_map(str(folder / name)) as mapped:
                options = pa.ipc.IpcReadOptions(use_threads=False)
                table = pa.ipc.open_stream(mapped, options=options).read_all().select([image, label])
            table.validate(full=True)
            images.append(table.column(image))
            found = [-1 if value is None else int(value) for value in table.column(label).to_pylist()]
            keys += [f"{split}/{len(labels) + i:09d}" for i in range(len(found))]
            labels += found
            splits += [split] * len(found)
    column = pa.chunked_array([chunk for array in images for chunk in array.chunks]) if images else None
    num_classes = len(classes) or MAX_CLASSES
    unique = Keys()
    ours = [unique.new(key) for key in keys]

    def load(number: int) -> tuple[bytes, int] | Fault:
        assert column is not None
        value: Any = column[number].as_py()
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            return Fault("has no bytes of an image; save it with them", ours[number])
        if not 0 <= labels[number] < num_classes:
            return Fault(f"label {labels[number]} is outside 0 … {num_classes - 1}", ours[number])
        return data, labels[number]

    return Content(
        name=root.resolve().name,
        classes=classes,
        keys=ours,
        splits=splits,
        sizes=np.full(len(labels), sum(file.stat().st_size for file in files) // max(1, len(labels))),
        load=load,
        labels=labels,
        stamp=stamp_of(files),
    )


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no object")
    return content


def _plain(name: str) -> bool:
    """Tell whether a name from data is that of something in its folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def _columns(
    folder: Path, features: Mapping[str, Any], image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Pick the columns by their features where the caller does not."""
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, Mapping)}
    given: list[tuple[str, str | None, Sequence[str]]] = [
        ("image", image_column, [name for name, kind in kinds.items() if kind == "Image"]),
        ("label", label_column, [name for name, kind in kinds.items() if kind == "ClassLabel"]),
    ]
    if not given[1][2]:
        given[1] = ("label", label_column, [name for name in ("label", "labels") if name in kinds])
    chosen = []
    for what, name, found in given:
        if name is None and len(found) != 1:
            raise ConfigError(
                f"{folder}: {len(found)} columns could be the {what} ({', '.join(found or kinds)}); name one with "
                f"--{what}-column"
            )
        if name is not None and name not in kinds:
            raise ConfigError(f"{folder}: has no column {name!r}; it has {', '.join(kinds)}")
        chosen.append(name or found[0])
    return chosen[0], chosen[1]
