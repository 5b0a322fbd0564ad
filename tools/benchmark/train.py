"""How many images a second train: our loop against a plain one, eager, in float32.

The plain loop runs the network without gates and asks for the loss and the hits of every batch. All
go through the same batches, crops and flips of noise that is in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F
from utils.acceleration import Acceleration
from utils.batches import Batches
from utils.tally import Tally

from tools.benchmark.timing import Comparison, Contender, Stopwatch
from tools.benchmark.workload import (
    add_workload_flags,
    exhaust,
    fresh_model,
    image_size,
    noise_batches,
    without_gates,
)
from utils.cli import count
from utils.distributed import Runtime, select_runtime
from utils.finetune import Trainer
from utils.recipes import CIFAR_BASELINE

LAID_OUT = Acceleration(channels_last=True)
MIXED = replace(LAID_OUT, amp="bf16")
ACCELERATIONS = {  # by the flags of train.py that ask for it
    "ours": Acceleration(),
    "--channels_last": LAID_OUT,
    "--channels_last --compile --fused": replace(LAID_OUT, compile=True, fused=True),
    "--amp bf16 --channels_last": MIXED,
    "--amp bf16 --channels_last --compile": replace(MIXED, compile=True),
    "--amp bf16 --channels_last --compile --fused": replace(MIXED, compile=True, fused=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_workload_flags(parser, 128, "gatevgg16")
    parser.add_argument("--batches", type=count, default=5, metavar="N", help="batches a round")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled ones out")


def compare_all(
    args: argparse.Namespace, runtime: Runtime, watch: Stopwatch
) -> Iterator[Comparison]:
    batches = noise_batches(args.batches, args.bs, image_size(args), runtime)
    contenders = [Contender("plain loop", PlainLoop(args.net, batches, runtime))]
    for name, acceleration in ACCELERATIONS.items():
        if not (acceleration.compile and args.no_compile):
            here = select_runtime(runtime.device.type, runtime.gpus, acceleration=acceleration)
            contenders.append(Contender(name, OurLoop(args.net, batches, here)))
    yield watch.compare(f"{args.net}, batch {args.bs}", contenders, batches.images)


class PlainLoop:
    """What one writes without a second thought."""

    def __init__(self, net: str, batches: Batches, runtime: Runtime):
        self.model, self.batches = without_gates(fresh_model(net)).to(runtime.device), batches
        self.optimizer = CIFAR_BASELINE.optimizer(self.model)

    def __call__(self, _: None) -> tuple[float, int]:
        self.model.train()
        loss_sum, hits = 0.0, 0
        for images, labels in self.batches:
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item() * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
        return loss_sum, hits


class OurLoop:
    """That of ``utils.finetune``, an epoch a round, without its progress bar."""

    def __init__(self, net: str, batches: Batches, runtime: Runtime):
        self.trainer = Trainer(fresh_model(net), CIFAR_BASELINE, runtime)
        self.batches, self.runtime = batches, runtime

    def __call__(self, _: None) -> Tally:
        tally = Tally(self.runtime)
        exhaust(self.trainer.train(self.batches, tally, "the benchmark"))
        return tally
