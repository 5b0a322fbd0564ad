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
from tools.benchmark.timing import Comparison, Contender, Stopwatch
from tools.benchmark.workload import add_workload_flags, fresh_model, image_size, noise_batch
from tools.export import to_pt2
from utils.checkpoint import load_model
from utils.cli import count, ratio
from utils.cost import model_cost
from utils.deploy import deployable
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
    unpruned, pruned = (model.eval() for model in _networks(args, runtime))
    size = image_size(args)
    costs = [model_cost(model, size) for model in (unpruned, pruned)]
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "unpruned": unpruned.to(runtime.device),
        "pruned": pruned.to(runtime.device),
        "unpruned, exported": _exported(unpruned, size, runtime),
        "pruned, exported": _exported(pruned, size, runtime),
    }
    for batch in sorted({1, args.bs}):
        images = noise_batch(argparse.Namespace(**{**vars(args), "bs": batch}), runtime)[0]
        times = max(1, FEW // batch)
        contenders = [
            Contender(name, partial(_run, network, images, times))
            for name, network in networks.items()
        ]
        title = f"{unpruned.net}, batch {batch}"
        comparison = watch.compare(title, contenders, times * batch)
        fewer = costs[0].macs / costs[1].macs
        faster, *_ = comparison.speed("pruned, exported", "unpruned, exported")
        comparison.facts |= {
            "multiply-adds, M": f"{costs[0].macs / 1e6:.1f} -> {costs[1].macs / 1e6:.1f}",
            "milliseconds a batch, pruned and exported": round(
                1000 * comparison.median("pruned, exported") / times, 2
            ),
            "fewer multiply-adds, times": round(fewer, 3),
            "faster, exported against exported, times": round(faster, 3),
            "share of it that becomes time": round(faster / fewer, 3),
            "exported against not exported, pruned, times": round(
                comparison.speed("pruned, exported", "pruned")[0], 3
            ),
        }
        yield comparison


def _networks(args: argparse.Namespace, runtime: Runtime) -> tuple[GatedModel, GatedModel]:
    if bool(args.checkpoint) != bool(args.pruned):
        raise InputError("--checkpoint and --pruned go together: the same network before and after")
    if args.checkpoint:
        unpruned, pruned = load_model(args.checkpoint), load_model(args.pruned)
        if unpruned.net != pruned.net:
            raise InputError(f"{args.pruned} is a {pruned.net}, {args.checkpoint} a {unpruned.net}")
        args.net = unpruned.net
        return unpruned, pruned
    model = fresh_model(args.net).to(runtime.device)
    saliency = channel_saliency(model, *noise_batch(args, runtime))
    groups = model.channel_groups()
    plan = select_channels(groups, saliency, args.p, round_to=args.round_to)
    return model, prune(copy.deepcopy(model), plan)


def _exported(model: GatedModel, size: int, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """What a user of the .pt2 file has: read back, and run as it is."""
    _, network = to_pt2(deployable(model.cpu()), size)
    model.to(runtime.device)
    return network.to(runtime.device)


def _run(network: Callable[[Tensor], Tensor], images: Tensor, times: int, _: None) -> None:
    with torch.inference_mode():
        for _ in range(times):
            network(images)
