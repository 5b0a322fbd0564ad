"""Every command line of the documentation is one that its script accepts."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py"),
         *ROOT.glob("docs/*.md")]  # fmt: skip
COMMAND = re.compile(r"(?:python|torchrun .*? --) (?:(\w+)\.py|-m (tools\.\w+))( .*|$)")
SHELL = re.compile(r"sh (experiments/\w+\.sh)")


def commands():
    for path in TEXTS:
        variables = dict(re.findall(r"^(\w+) := (.*)$", path.read_text(), re.MULTILINE))
        for line in path.read_text().splitlines():
            match = COMMAND.search(line.strip())
            if match and line.startswith(("    ", "\t", "$")):
                script, tool, argv = match.groups()
                script = script or tool
                for name, value in variables.items():
                    argv = argv.replace(f"$({name})", value)
                yield pytest.param(script, argv.split("#")[0], id=f"{path.name}: {line.strip()}")


def test_there_are_commands_to_check():
    assert len(list(commands())) > 12


@pytest.mark.parametrize("script, argv", list(commands()))
def test_documented_command_is_accepted(script, argv):
    argv = re.split(r"\s{2,}", argv.strip())[0]  # what follows two spaces is a remark
    argv = argv.replace("<path-to-imagenet>", "imagenet")
    module = importlib.import_module(script)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{script}.__main__")
    module.parse_args(shlex.split(argv))


def test_shell_scripts_that_are_named_are_there():
    named = {name for path in [*TEXTS, *ROOT.glob("experiments/*.sh")]
             for name in SHELL.findall(path.read_text())}  # fmt: skip
    assert len(named) > 2 and all((ROOT / name).is_file() for name in named)
