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
    """Raise InputError, naming the entry, where one is not of the kind that we write."""
    _check(content, NEEDED)
    _check(content["network"], NETWORK)
    _check(content, {name: kind for name, kind in METADATA.items() if name in content})


def _check(entries: Mapping[str, Any], kinds: Mapping[str, tuple[str, Callable]]) -> None:
    for name, (kind, fits) in kinds.items():
        if not fits(entries.get(name)):
            raise InputError(f"damaged: {name!r} is not {kind}")


def _is_a(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _is_whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _are(fits: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(fits, values))


def _is_normalisation(value: Any) -> bool:
    mean, std = (value.get("mean"), value.get("std")) if isinstance(value, Mapping) else (0, 0)
    finite = _are(_is_finite, mean) and _are(_is_finite, std)
    return finite and len(mean) == len(std) == 3 and min(std) > 0


def _is_config(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # it could not go into a result.json
        return False
    return isinstance(value, Mapping) and _is_whole(value.get("holdout", 0), 0)


TEXT = ("text", _is_a(str))
MAPPING = ("a mapping", _is_a(Mapping))
COUNT = ("a whole number of at least 1", _is_whole)

# Name -> the kind of entry in words, and whether a value is one.
NEEDED = {"sha256": TEXT, "network": MAPPING, "state_dict": MAPPING}
NETWORK = {"net": TEXT, "num_classes": COUNT, "kept": MAPPING}
METADATA = {
    **dict.fromkeys(("dataset", "tested_on", "chosen"), TEXT),
    "source": ("text or None", _is_a(str, type(None))),
    **dict.fromkeys(("image_size", "resize"), COUNT),
    "classes": ("a list of names", lambda value: _are(_is_a(str), value)),
    "normalisation": ("mean and std of 3 finite numbers, std above 0", _is_normalisation),
    "config": ("a mapping of plain values", _is_config),
    "accuracy": ("a finite number or None", lambda v: v is None or _is_finite(v)),
    "epoch": ("a whole number of at least 0", lambda value: _is_whole(value, 0)),
    "training": MAPPING,
}
