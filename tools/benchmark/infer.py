"""How long a batch takes to classify: unpruned and pruned, as they are and exported to pt2.

The share of the multiply-adds' ratio that becomes real time is (t0 / t) / (m0 / m), of the exported
pruned network against the exported unpruned one. Fresh weights are scored on noise, and keep other
channels than trained ones do; --checkpoint and --pruned take a network that was really pruned.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from models import GatedModel
from models.gate import deployable
from tools.benchmark.timing import Comparison, Contender, Stopwatch
from tools.benchmark.workload import add_workload_flags, fresh_model, image_size, noise_batch
from tools.export import to_pt2
from utils.checkpoint import load_checkpoint
from utils.cli import count, ratio
from utils.cost import model_cost
from utils.distributed import Runtime
from utils.errors import InputError
from utils.pruning import select_channels
from utils.saliency import channel_saliency
from utils.surgery import prune

FEW = 64  # images in a run of small batches, so that it is long enough to be timed


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_workload_flags(parser, 64, "gatevgg16")
    add = parser.add_argument
    add("--p", type=ratio, default=0.5, metavar="RATIO", help="how much is cut of fresh weights")
    add("--round_to", type=count, default=8, metavar="N", help="widths in multiples of it")
    add("--checkpoint", metavar="FILE", help="the unpruned network; takes the place of --net")
    add("--pruned", metavar="FILE", help="the same network pruned; goes with --checkpoint")


def compare_all(
    args: argparse.Namespace, runtime: Runtime, watch: Stopwatch
) -> Iterator[Comparison]:
    unpruned, pruned, size = _networks(args, runtime)
    before, after = (model_cost(model.eval(), size).macs for model in (unpruned, pruned))
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "unpruned": unpruned.to(runtime.device),
        "pruned": pruned.to(runtime.device),
        "unpruned, exported": _exported(unpruned, size, runtime),
        "pruned, exported": _exported(pruned, size, runtime),
    }
    for batch in sorted({1, args.bs}):
        images, _ = noise_batch(batch, size, runtime)
        times = max(1, FEW // batch)
        contenders = [
            Contender(name, partial(_run, network, images, times))
            for name, network in networks.items()
        ]
        comparison = watch.compare(f"{unpruned.net}, batch {batch}", contenders, times * batch)
        faster = comparison.speed("pruned, exported", "unpruned, exported")
        comparison.facts = {
            "milliseconds a batch": ", ".join(
                f"{name} {1000 * comparison.median(name) / times:.2f}" for name in networks
            ),
            "multiply-adds, M": f"{before / 1e6:.1f} -> {after / 1e6:.1f}",
            "fewer multiply-adds, times": round(before / after, 3),
            "faster, exported against exported, times": comparison.speed_text(
                "pruned, exported", "unpruned, exported"
            ),
            "share of it that becomes time": round(faster[0] / (before / after), 3),
            "exported against not exported, pruned, times": comparison.speed_text(
                "pruned, exported", "pruned"
            ),
        }
        yield comparison


def _networks(args: argparse.Namespace, runtime: Runtime) -> tuple[GatedModel, GatedModel, int]:
    """Before and after, and the size of the images."""
    if bool(args.checkpoint) != bool(args.pruned):
        raise InputError("--checkpoint and --pruned go together: the same network before and after")
    if args.checkpoint:
        whole, pruned = load_checkpoint(args.checkpoint), load_checkpoint(args.pruned)
        nets = whole.model.net, pruned.model.net
        if nets[0] != nets[1]:
            raise InputError(f"{args.pruned} is a {nets[1]}, {args.checkpoint} a {nets[0]}")
        args.net, args.image_size = nets[0], args.image_size or whole.meta.get("image_size")
        return whole.model, pruned.model, image_size(args)
    size, model = image_size(args), fresh_model(args.net).to(runtime.device)
    saliency = channel_saliency(model, *noise_batch(args.bs, size, runtime))
    groups = model.channel_groups()
    plan = select_channels(groups, saliency, args.p, round_to=args.round_to)
    return model, prune(copy.deepcopy(model), plan), size


def _exported(model: GatedModel, size: int, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """What a user of the .pt2 file has: read back, and run as it is."""
    _, network = to_pt2(deployable(model.cpu()), size)
    model.to(runtime.device)
    return network.to(runtime.device)


def _run(network: Callable[[Tensor], Tensor], images: Tensor, times: int, _: None) -> None:
    with torch.inference_mode():
        for _ in range(times):
            network(images)
