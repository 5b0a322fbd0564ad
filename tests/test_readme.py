"""The documentation: its commands are accepted, its links lead somewhere, the README is short."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from models import NETWORKS, build_model, group_widths
from utils.cli.settings import configuration

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")]
TEXTS += ROOT.glob("docs/*.md")
COMMAND = re.compile(
    r"(?:python|torchrun .*? --) (?:(\w+)\.py|-m ((?:tools|experiments)\.\w+))( .*|$)"
)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")]
PAGES += ROOT.glob("docs/*.md")
INLINE = re.compile(r"`((?:python|torchrun) [^`\n]+(?<!--help))`")
LINK = re.compile(r"\]\(([^)#\s]+)")
SHELL = re.compile(r"sh (experiments/\w+\.sh)")


def commands():
    for path in TEXTS:
        variables = dict(re.findall(r"^(\w+) := (.*)$", path.read_text(), re.MULTILINE))
        lines = path.read_text().splitlines()
        lines = [line for line in lines if line.startswith(("    ", "\t", "$"))]
        for line in lines + INLINE.findall(path.read_text()):
            match = COMMAND.search(line.strip())
            if match:
                script, tool, argv = match.groups()
                script = script or tool
                for name, value in variables.items():
                    argv = argv.replace(f"$({name})", value)
                yield pytest.param(script, argv.split("#")[0], id=f"{path.name}: {line.strip()}")


def test_there_are_commands_to_check():
    assert len(list(commands())) > 12


@pytest.mark.parametrize("script, argv", list(commands()))
def test_documented_command_is_accepted(script, argv, tmp_path, monkeypatch):
    argv = re.split(r"\s{2,}", argv.strip())[0]  # what follows two spaces is a remark
    argv = argv.replace("<path-to-imagenet>", "imagenet")
    module = importlib.import_module(script)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{script}.__main__")
    words = shlex.split(argv)
    if "--config" in words:  # the file of a run without other flags
        monkeypatch.chdir(tmp_path)
        file = Path(words[words.index("--config") + 1])
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(configuration(module.parse_args([]))))
    module.parse_args(words)


def test_shell_scripts_that_are_named_are_there():
    texts = [path.read_text() for path in [*TEXTS, *ROOT.glob("experiments/*.sh")]]
    named = {name for text in texts for name in SHELL.findall(text)}
    assert len(named) > 2 and all((ROOT / name).is_file() for name in named)


def links(page):
    targets = LINK.findall(page.read_text())
    return [page.parent / target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page):
    assert [str(target) for target in links(page) if not target.exists()] == []


def test_readme_is_short_and_links_to_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 220
    linked = {target.resolve() for target in links(readme)}
    assert {*ROOT.glob("docs/*.md")} - linked == set()


def test_make_lists_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\w+) +\w", listed, re.MULTILINE) == targets


def python(page):
    """The only Python of a page."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return code


def test_python_of_your_network_runs_as_it_stands(monkeypatch):
    page = (ROOT / "docs/your-network.md").read_text()
    denoising, gated = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    known = {}
    exec(denoising, known)
    assert type(known["model"]).__name__ == "DnCNN"
    assert sum(group_widths(known["model"]).values()) == 5 * 64 // 2
    assert known["model"](known["noisy"]).shape == (16, 3, 32, 32)
    monkeypatch.setitem(NETWORKS, "small", None)  # what the page adds goes again
    exec(gated, known)
    assert NETWORKS["small"] is known["Small"]
    assert [group.name for group in known["Small"](3).channel_groups()] == ["gate"]


def test_python_of_the_readme_runs_as_it_stands():
    known = {}
    exec(python("README.md"), known)
    kept, whole = group_widths(known["model"]), group_widths(build_model("gateresnet20"))
    assert sum(kept.values()) < 0.5 * sum(whole.values())


def test_the_run_of_docs_api_runs_as_it_stands(tmp_path, monkeypatch):
    (tmp_path / "prune_mine.py").write_text(python("docs/api.md"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model, again = importlib.import_module("prune_mine").main()
    assert group_widths(again) == group_widths(model) != {"features.1": 32, "features.5": 64}
    assert sum(group_widths(model).values()) < 0.5 * (32 + 64)
    state = again.state_dict()
    assert all(
        torch.equal(state[name], tensor.cpu()) for name, tensor in model.state_dict().items()
    )
