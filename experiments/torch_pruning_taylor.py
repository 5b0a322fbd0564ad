"""gfbs_cifar.py with Torch-Pruning's Taylor importance as the score, for comparison.

    python -m experiments.torch_pruning_taylor --net gateresnet56 --macs 0.5 --epochs 10 --cosine

Takes the flags of gfbs_cifar.py and writes the same files; needs requirements-dev.txt. Scores are
those of Torch-Pruning's ``GroupTaylorImportance`` with its default settings, from gradients in eval
mode. Selection and surgery are ours, as with every criterion.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

import gfbs_cifar
from models import channel_groups
from models.gate import folded_gates
from models.layers import PadShortcut
from utils.cli.parser import run_script
from utils.saliency import CRITERIA, Criterion
from utils.surgery import keep_inputs, keep_outputs

NAME = "torch-pruning taylor"


class ShortcutPruner(torch_pruning.BasePruningFunc):
    """Tells Torch-Pruning that input and output channels of a shortcut are cut independently.

    Without it, the graph cannot be followed through the shortcut.
    """

    def prune_out_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> PadShortcut:
        keep_outputs(layer, torch.tensor(sorted({*range(len(layer.source))} - {*idxs})))
        return layer

    def prune_in_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> PadShortcut:
        keep_inputs(layer, torch.tensor(sorted({*range(layer.in_channels)} - {*idxs})))
        return layer

    def get_out_channels(self, layer: PadShortcut) -> int:
        return len(layer.source)

    def get_in_channels(self, layer: PadShortcut) -> int:
        return layer.in_channels


def dependency_graph(model: nn.Module, images: Tensor) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's view of a gated model; gates are not part of it."""
    pruners, graph = {PadShortcut: ShortcutPruner()}, torch_pruning.DependencyGraph()
    with folded_gates(model):
        return graph.build_dependency(model, images[:2], customized_pruners=pruners, verbose=False)


def torch_pruning_saliency(
    model: nn.Module, images: Tensor, labels: Tensor, **_: Any
) -> dict[str, Tensor]:
    """Replaces ``channel_saliency``: the importance (C,) of each group, by its name.

    Raises ValueError where Torch-Pruning couples other channels than the network does.
    """
    model = copy.deepcopy(model).eval()
    graph = dependency_graph(model, images)
    with folded_gates(model):
        F.cross_entropy(model(images), labels).backward()
    names = {module: name for name, module in model.named_modules()}
    importance, saliency = torch_pruning.importance.GroupTaylorImportance(), {}
    for group in channel_groups(model):
        conv = model.get_submodule(group.convs[0])
        channels = list(range(conv.out_channels))
        theirs = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, channels)
        coupled = {names[dep.layer] for dep, _ in theirs if dep.layer in names}
        if coupled != {*group.outputs, *group.inputs} - {*group.gates}:
            raise ValueError(f"Torch-Pruning couples {sorted(coupled)} with group {group.name}")
        saliency[group.name] = importance(theirs).cpu()
    return saliency


def known() -> AbstractContextManager:
    """Adds the criterion to those of gfbs_cifar.py inside this context."""
    return mock.patch.dict(CRITERIA, {NAME: Criterion(torch_pruning_saliency, gradients="norms")})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    with known():
        return gfbs_cifar.parse_args([*argv, "--criterion", NAME])


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what result.json says."""
    with known(), mock.patch.object(gfbs_cifar, "channel_saliency", torch_pruning_saliency):
        return gfbs_cifar.main(args)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
