"""Command lines: one line for bad input, --config, checked values, and how a script ends."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from models import check_network
from utils.cli import settings
from utils.distributed import leave, lost_a_rank
from utils.errors import InputError, Interrupted, RunError
from utils.run import launch
from utils.run.existing import BEFORE, read_dict
from utils.run.provenance import program
from utils.run.signals import SIGNALS

KILLED = (
    "a data worker was killed, perhaps because memory ran out; use fewer --workers or smaller"
    " batches, and continue with --resume"
)
NO_FLAGS = {"baseline", "classes", "data"}  # what a configuration says of weights and images
_UNSET = object()


class Parser(argparse.ArgumentParser):
    """Answers bad input with one line and exit code 2; takes flags with ``-`` or with ``_``."""

    def __init__(self, **options: Any):
        layout = partial(_HelpFormatter, max_help_position=30)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Flags with ``-`` or ``_``; those of --config come first, so that typed ones win."""
        words = [_underscored(arg) for arg in (sys.argv[1:] if args is None else args)]
        if any(word.partition("=")[0] == "--config" for word in words):
            unset = argparse.Namespace(**dict.fromkeys((a.dest for a in self._actions), _UNSET))
            seen, _ = super().parse_known_args(words, unset)
            typed = {name for name, value in vars(seen).items() if value is not _UNSET}
            words = [*self._repeating(seen.config, typed), *words]
        args, unknown = super().parse_known_args(words, namespace)
        args.defaults = {action.dest: action.default for action in self._actions}
        return args, unknown

    def _repeating(self, path: str, typed: set[str]) -> list[str]:
        """The words of a command line that repeats the run with this config.json.

        Leaves out the flags in ``typed`` and those that they exclude. Ends with one line if the
        file is no configuration, or that of another script.
        """

        def refuse(why: str) -> NoReturn:
            self.error(f"--config {path} {why}; name the config.json of a run of {self.prog}")

        flags: dict[str, list[argparse.Action]] = {}
        for action in self._actions:
            if action.dest not in settings.NO_CONFIGURATION | {"help"}:
                flags.setdefault(action.dest, []).append(action)
        content = read_dict(Path(path))
        if content is None:
            refuse("is missing or no configuration")
        if "dataset" not in flags:  # a script with one data set
            content.pop("dataset", None)
        if unknown := sorted(content.keys() - NO_FLAGS - flags.keys()):
            refuse(f"has {', '.join(unknown)}, which no flag here sets")
        if ("criterion" in content) != ("criterion" in flags):
            refuse("is of another script")
        groups = [{a.dest for a in g._group_actions} for g in self._mutually_exclusive_groups]
        replaced = {name for group in groups if group & typed for name in group} - typed
        replaced |= {name for name, way in settings.NEEDS.items() if way in replaced}
        words = []
        for name in flags.keys() - typed - replaced:
            value = content.get(name, BEFORE.get(name, False))
            switch = next((f for f in flags[name] if f.nargs == 0 and f.const is value), None)
            if switch:
                words.append(switch.option_strings[0])
            elif value is not None and value is not False:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words.append(f"--{name}={text}")
        return words

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default value to the help of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.nargs != 0 and action.default not in (None, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown and "(default" not in text else text


def _underscored(arg: str) -> str:
    """Turn ``--data-dir=a-b`` into ``--data_dir=a-b``."""
    return re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg)


def run_script(
    parse_args: Callable[..., argparse.Namespace], main: Callable[[argparse.Namespace], Any]
) -> int:
    """Run a script and return its exit code.

    2 for bad input, 1 for a run that cannot go on, 130 and 143 for SIGINT and SIGTERM, each with
    one line on stderr.
    """
    with SIGNALS.handled():
        code = _run(parse_args, main)
        if code > 128:
            SIGNALS.ignore_afterwards()
        return launch.end(code)


def _run(
    parse_args: Callable[..., argparse.Namespace], main: Callable[[argparse.Namespace], Any]
) -> int:
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # the parent process has closed it
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
        getattr(sys, stream).reconfigure(errors="backslashreplace")  # names may be in any alphabet
    name = Path(program()[-1]).name
    try:
        args = parse_args()
        ranks, how = settings.processes(args)
        if how:
            os.environ[launch.STARTED] = how
        if ranks > 1:
            return launch.start([*program(), *sys.argv[1:]], ranks)
        main(args)
    except (InputError, RunError) as error:
        return _say(2 if isinstance(error, InputError) else 1, f"{name}: error: {error}")
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if said.startswith("DataLoader worker"):  # any line may raise it
            return _say(1, f"{name}: error: {KILLED}")
        if not lost_a_rank(error):
            raise
        return _say(1, f"{name}: error: another rank has died or left, so this one stops ({said})")
    except OSError as error:
        if not (isinstance(error, PermissionError) or error.errno == errno.ENAMETOOLONG):
            raise
        return _say(2, f"{name}: error: {error.filename}: {error.strerror}; name another path")
    except Interrupted as stop:
        how = f"; continue with: {stop.resume_with}" if stop.resume_with else ""
        return _say(128 + stop.signum, f"{name}: {stop}{how}")
    finally:
        leave()
    return 0


def _say(code: int, line: str) -> int:
    if launch.is_root_cause(code):
        with suppress(OSError):  # the reader of a pipe may be gone
            print(line, file=sys.stderr)
    return code


def _parse(read: Callable[[str], Any], wanted: str, text: str) -> Any:
    """What ``read`` makes of the text; its ValueError becomes a line with what is ``wanted``."""
    try:
        return read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None


def _number(kind: type, low: float, high: float, wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value < high:
            raise ValueError
        return value

    return partial(_parse, read, wanted)


count = _number(int, 1, 2**31, "a whole number of at least 1")
count_or_zero = _number(int, 0, 2**31, "a whole number of at least 0")
parts = _number(int, 2, 2**31, "a whole number of at least 2")
ratio = _number(float, 0, 1, "a ratio in [0, 1)")
share = _number(float, sys.float_info.min, 1 + sys.float_info.epsilon, "a share in (0, 1]")
inner_share = _number(float, sys.float_info.min, 1, "a share in (0, 1)")
_FLOAT32 = torch.finfo(torch.float32).max
positive = _number(float, sys.float_info.min, _FLOAT32, f"a positive number below {_FLOAT32:.2g}")
weight = _number(float, 0, _FLOAT32, f"a number of at least 0 and below {_FLOAT32:.2g}")
factor = _number(float, 0, 1e6, "a number of at least 0 and below 1e6")


def network(known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            return check_network(text, known)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def channel_values(low: float) -> Callable[[str], tuple[float, ...]]:
    """A parser for three numbers from ``low`` to 1, for red, green and blue."""

    def read(text: str) -> tuple[float, ...]:
        red, green, blue = values = tuple(map(float, text.split(",")))
        if not all(low <= value <= 1 for value in values):
            raise ValueError
        return values

    return partial(_parse, read, f"three numbers from {low:g} to 1 such as 0.485,0.456,0.406")


def gpu_ids(text: str) -> tuple[int, ...]:
    ids = text.split(",")
    if not all(part.strip().isdecimal() for part in ids) or len(set(map(int, ids))) < len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPU ids such as 0,1")
    return tuple(map(int, ids))
