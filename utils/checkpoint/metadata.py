"""What a checkpoint of ours must hold and may hold, entry by entry."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import InputError

FORMAT = "gfbs/1"


def check_format(content: Mapping[str, Any]) -> None:
    """Raise InputError for a checkpoint of another version."""
    _check(content, {"format": TEXT})
    if content["format"] != FORMAT:
        raise InputError(f"of format {content['format']!r}; this version reads {FORMAT!r}")


def check_entries(content: Mapping[str, Any]) -> None:
    """Raise InputError with the name of the first entry that is not of its kind."""
    _check(content, {"sha256": TEXT, "network": MAPPING, "state_dict": MAPPING})
    _check(content["network"], {"net": TEXT, "num_classes": COUNT, "kept": MAPPING})
    _check(content, {name: kind for name, kind in METADATA.items() if name in content})


def _check(entries: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    for name, (kind, fits) in kinds.items():
        if not fits(entries.get(name)):
            raise InputError(f"damaged: {name!r} is not {kind}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _is_normalisation(value: Any) -> bool:
    match value:
        case {"mean": [_, _, _] as mean, "std": [_, _, _] as std}:
            return all(map(_is_finite, [*mean, *std])) and min(std) > 0
    return False


def _is_config(value: Any) -> bool:
    try:
        json.dumps(value)  # a result.json will hold it
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping) and NATURAL[1](value.get("holdout", 0))


INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
Kind = tuple[str, Callable[[Any], bool]]  # its name, and whether a value is of it
TEXT: Kind = ("text", lambda value: isinstance(value, str))
MAPPING: Kind = ("a mapping", lambda value: isinstance(value, Mapping))
COUNT: Kind = ("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
NATURAL: Kind = ("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
METADATA: dict[str, Kind] = {
    **dict.fromkeys(("dataset", "tested_on", "chosen"), TEXT),
    **dict.fromkeys(("image_size", "resize"), COUNT),
    "interpolation": ("the name of a filter", lambda value: value in INTERPOLATIONS),
    "epoch": NATURAL,
    "training": MAPPING,
    "source": ("text or None", lambda value: value is None or TEXT[1](value)),
    "accuracy": ("a finite number or None", lambda value: value is None or _is_finite(value)),
    "classes": ("a list of names", lambda v: isinstance(v, (list, tuple)) and all(map(TEXT[1], v))),
    "normalisation": ("mean and std of 3 finite numbers, std above 0", _is_normalisation),
    "config": ("a mapping of plain values", _is_config),
}
