"""--config: the flags of an earlier run, from the config.json that it wrote."""

from __future__ import annotations

from argparse import Action, ArgumentParser
from pathlib import Path
from typing import Any

from utils.cli.settings import NEEDS, NO_CONFIGURATION
from utils.run.existing import BEFORE, read_dict

NO_FLAGS = {"baseline", "classes", "data"}  # what a configuration says of weights and images


def repeating(path: str, parser: ArgumentParser, typed: set[str]) -> list[str]:
    """The words of a command line that repeats the run, without the flags in ``typed``, and without
    those that they exclude.

    Ends with one line if the file is no configuration, or that of another script.
    """
    content = read_dict(Path(path))
    flags: dict[str, list[Action]] = {}
    for action in parser._actions:
        if action.dest not in NO_CONFIGURATION | {"help"}:
            flags.setdefault(action.dest, []).append(action)
    why = "is missing or no configuration" if content is None else ""
    if content and "dataset" not in flags:  # a script with one data set
        content = {name: value for name, value in content.items() if name != "dataset"}
    if unknown := sorted({*(content or ())} - NO_FLAGS - flags.keys()):
        why = f"has {', '.join(unknown)}, which no flag here sets"
    elif content is not None and ("criterion" in content) != ("criterion" in flags):
        why = "is of another script"
    if why:
        parser.error(f"--config {path} {why}; name the config.json of a run of {parser.prog}")
    groups = [{a.dest for a in g._group_actions} for g in parser._mutually_exclusive_groups]
    replaced = {name for group in groups if group & typed for name in group} - typed
    skipped = typed | replaced | {name for name, way in NEEDS.items() if way in replaced}
    words = []
    for name in flags.keys() - skipped:
        value = content.get(name, BEFORE.get(name, False))
        switch = next((f for f in flags[name] if f.nargs == 0 and f.const is value), None)
        if switch:
            words.append(switch.option_strings[0])
        elif value is not None and value is not False:
            words.append(f"--{name}={_text(value)}")
    return words


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
