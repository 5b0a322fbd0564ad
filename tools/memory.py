"""How much memory an image costs in training and in scoring: bytes kept for the backward pass.

    python -m tools.memory --net resnet50
    python -m tools.memory --net resnet152 --image_size 288

Counted from the tensors that autograd saves in float32, on shapes without data, so it needs neither
a GPU nor the memory. Optimiser, gradients and weights come on top: 12 bytes a parameter together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import NETWORKS, GatedModel, build_model
from utils.cli import Parser, count, network, run_script


@dataclass(frozen=True)
class Saved:
    """Bytes an image: all that is saved, and with the network's blocks computed again."""

    plain: int
    checkpointed: int


def saved_bytes(model: GatedModel, image_size: int) -> Saved:
    """Bytes that one more image in the batch keeps for the backward pass.

    With activation checkpointing that is what is saved outside of the blocks, every block's input,
    and the inside of the one block that is being computed again.
    """
    model = model.to("meta").train()
    small, large = (_count(model, batch, image_size) for batch in (2, 4))
    # The difference leaves out what does not grow with the batch, such as weights.
    inside = [(b - a) // 2 for a, b in zip(small.inside, large.inside, strict=True)]
    outside = (large.outside - small.outside) // 2
    inputs = (large.inputs - small.inputs) // 2
    return Saved(outside + sum(inside), outside + inputs + max(inside, default=0))


@dataclass
class _Count:
    outside: int
    inside: list[int]
    inputs: int


def _count(model: GatedModel, batch: int, image_size: int) -> _Count:
    blocks = model.checkpoint_blocks()
    total, active, seen = _Count(0, [0] * len(blocks), 0), [], set()

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)  # so that no later storage takes its address
            if active:
                total.inside[active[-1]] += storage.nbytes()
            else:
                total.outside += storage.nbytes()
        return tensor

    def enter(block: nn.Module, inputs: tuple[Tensor]) -> None:
        active.append(blocks.index(block))
        total.inputs += inputs[0].nbytes

    def leave(*_: object) -> None:
        active.pop()

    alive: list[torch.UntypedStorage] = []
    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    images = torch.empty(batch, 3, image_size, image_size, device="meta")
    labels = torch.zeros(batch, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        F.cross_entropy(model(images), labels)
    for handle in handles:
        handle.remove()
    return total


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.memory")
    parser.add_argument("--net", type=network(list(NETWORKS)), default="resnet50", help="which")
    parser.add_argument("--image_size", type=count, default=224, metavar="PIXELS", help="side")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> Saved:
    with torch.device("meta"):
        model = build_model(args.net)
    saved = saved_bytes(model, args.image_size)
    print(f"{args.net} at {args.image_size} pixels, MB an image: {saved.plain / 1e6:.1f}"
          f", with --checkpoint_activations {saved.checkpointed / 1e6:.1f}")  # fmt: skip
    return saved


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
