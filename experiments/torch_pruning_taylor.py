"""gfbs_cifar.py with Torch-Pruning's Taylor importance as the score, for comparison.

    python -m experiments.torch_pruning_taylor --net gateresnet56 --macs 0.5 --epochs 10 --cosine

Takes the flags of gfbs_cifar.py and writes the same files; needs requirements-dev.txt. Coupled
channels and their scores are Torch-Pruning's own: its ``GroupTaylorImportance`` with the default
settings, of gradients in eval mode. As with all criteria, the lowest of the network go until the
budget is met, residual streams included, and our surgery cuts them.
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
from models import GatedModel
from models.gate import folded_gates
from models.layers import PadShortcut
from utils.cli.parser import run_script
from utils.saliency import CRITERIA, Criterion
from utils.surgery import keep_inputs, keep_outputs

NAME = "torch-pruning taylor"


class ShortcutPruner(torch_pruning.BasePruningFunc):
    """Tells Torch-Pruning that both sides of a shortcut are cut independently, as a convolution's.

    Without it, the graph cannot be followed through the shortcut.
    """

    def prune_out_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> PadShortcut:
        keep_outputs(layer, _others(idxs, self.get_out_channels(layer)))
        return layer

    def prune_in_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> PadShortcut:
        keep_inputs(layer, _others(idxs, self.get_in_channels(layer)))
        return layer

    def get_out_channels(self, layer: PadShortcut) -> int:
        return len(layer.source)

    def get_in_channels(self, layer: PadShortcut) -> int:
        return layer.in_channels


def _others(idxs: Sequence[int], width: int) -> Tensor:
    return torch.tensor(sorted({*range(width)} - {*idxs}))


def dependency_graph(model: nn.Module, images: Tensor) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's view of a gated model, with its gates folded; gates are left uncut."""
    with folded_gates(model):
        return torch_pruning.DependencyGraph().build_dependency(
            model, images[:2], customized_pruners={PadShortcut: ShortcutPruner()}, verbose=False
        )


def torch_pruning_saliency(
    model: GatedModel, images: Tensor, labels: Tensor, **_: Any
) -> dict[str, Tensor]:
    """In the place of ``channel_saliency``: the importance (C,) of each group, by its name.

    Raises ValueError where Torch-Pruning couples other channels than the network does.
    """
    model = copy.deepcopy(model).eval()
    graph = dependency_graph(model, images)
    with folded_gates(model):
        F.cross_entropy(model(images), labels).backward()
    names = {module: name for name, module in model.named_modules()}
    importance, saliency = torch_pruning.importance.GroupTaylorImportance(), {}
    for group in model.channel_groups():
        conv = model.get_submodule(group.convs[0])
        channels = list(range(conv.out_channels))
        theirs = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, channels)
        coupled = {names[dep.layer] for dep, _ in theirs if dep.layer in names}
        if coupled != {*group.outputs, *group.inputs} - {*group.gates}:
            raise ValueError(f"Torch-Pruning couples {sorted(coupled)} with group {group.name}")
        saliency[group.name] = importance(theirs).cpu()
    return saliency


def known() -> AbstractContextManager:
    """Makes the criterion known to the flags and the scoring of gfbs_cifar.py for a while."""
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
