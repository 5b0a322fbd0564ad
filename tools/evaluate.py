"""What networks can do and what they cost, in one table.

    python -m tools.evaluate checkpoints/gatevgg16/model_best.pth --data cifar10
    python -m tools.evaluate before.pth after.pth after.pt2 --data my_images --per_class
    python -m tools.evaluate before.pth after.onnx

Takes checkpoints of ours and of other programs, and files of tools.export (.pt2, .onnx) with the
FILE.json beside them. Prints accuracy and loss, multiply-adds, parameters, size of the file, the
time for a batch of 1 and of 64 images, and the channels of every group after and before pruning.
Without --data, no accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import IMAGENET_NETWORKS, group_widths, structure
from models.gate import folded_gates
from models.groups import Structure
from tools.export import read
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import flags, settings
from utils.cli.parser import Parser, count, count_or_zero, run_script
from utils.cost import Cost, model_cost, seconds
from utils.data import folders, small
from utils.data.batches import About, Batches, choose_normalisation
from utils.data.listing import list_images
from utils.distributed import Runtime, select_runtime
from utils.errors import InputError
from utils.files import writable, write_json
from utils.metrics import Metrics, RunningMetrics
from utils.run.baseline import check_classes

BATCHES = (1, 64)  # that are timed


class Exported(nn.Module):
    """A .pt2 or .onnx file, and what FILE.json says of it."""

    def __init__(self, path: Path, device: torch.device):
        super().__init__()
        try:
            said = json.loads(Path(f"{path}.json").read_text())
            self.structure = Structure(said["output"]["shape"][1], "", said["net"])
            size, classes = said["input"]["shape"][2], said["classes"]
            self.meta = {**said["input"], "image_size": size, "classes": classes}
            self.cost = Cost(said["macs"], said["params"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            how = "tools.export writes it beside its file"
            raise InputError(f"{path}.json does not describe {path} ({error!r}); {how}") from None
        # In a tuple: modules of torch.export refuse train and eval.
        self.network = (read(path, device),)

    def forward(self, images: Tensor) -> Tensor:
        return self.network[0](images).to(images.device)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.evaluate")
    add, names = parser.add_argument, "cifar10, cifar100, synthetic"
    add("files", nargs="+", metavar="FILE", help="checkpoints, .pt2 and .onnx files")
    images = "a folder with test/<class>/, val/<class>/ or <class>/"
    add("--data", metavar="DATA", help=f"the images: {images}; or {names}")
    add("--data_dir", default="./data", metavar="DIR", help="where CIFAR is, or goes")
    add("--image_size", type=count, metavar="PIXELS", help="side (default: as the file says)")
    add("--bs", type=count, default=100, metavar="N", help="images in a batch of the evaluation")
    add("--limit_batches", type=count, metavar="N", help="evaluate on N batches only")
    add("--workers", type=count_or_zero, default=4, metavar="N", help="to read large images")
    add("--per_class", action="store_true", help="top-1 accuracy of every class, too")
    add("--json", metavar="FILE", help="write everything into this file, too")
    flags.add_loading_flag(parser)
    flags.add_normalisation_flags(parser)
    flags.add_device_flags(parser)
    args = parser.parse_args(argv)
    settings.check_normalisation(parser, args)
    if args.per_class and not args.data:
        parser.error("--per_class goes with --data")
    return args


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every file, print the table, and return what --json writes."""
    runtime = select_runtime(args.device, args.gpu)
    runtime = replace(runtime, gpus=runtime.gpus[:1])  # times are of one GPU
    rows = [measure(Path(name), args, runtime) for name in args.files]
    print(table(rows))
    if args.json:
        with writable(args.json, "--json"):
            write_json(args.json, rows)
    return rows


def measure(path: Path, args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Everything about one file."""
    exported = path.suffix in (".pt2", ".onnx")
    if exported:
        model, channels = Exported(path, runtime.device), {}
        file = Checkpoint(model, model.meta)
    else:
        file = load_checkpoint(path, args.net)
        model = runtime.for_evaluation(file.model.float().eval())
        widths = group_widths(model)
        channels = {g.name: [widths[g.name], g.width] for g in structure(model).groups}
    net = structure(model).net
    usual = file.meta.get("image_size") or (224 if net in IMAGENET_NETWORKS else 32)
    size = args.image_size or usual
    if exported and size != usual:
        raise InputError(f"--image_size {size}: {path} takes images of {usual} pixels only")
    cost = model.cost if exported else model_cost(model, size)
    numbers, by_class = {}, {}
    with torch.inference_mode(), folded_gates(model):
        if args.data:
            batches, classes = load_batches(file, size, args, runtime)
            with closing(batches) if hasattr(batches, "close") else nullcontext():
                metrics, hits = evaluate(model, batches, len(classes), runtime)
            numbers = {"top-1, %": metrics.accuracy, "top-5, %": metrics.top5}
            numbers |= {"loss": metrics.loss, "images": metrics.images}
            by_class = dict(zip(classes, hits, strict=True)) if args.per_class else {}
        numbers |= {"MACs, M": cost.macs / 1e6, "params, M": cost.params / 1e6}
        numbers["MB"] = path.stat().st_size / 1e6
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size, device=runtime.device)
            numbers[f"ms, batch {batch}"] = 1e3 * seconds(partial(model, images))
    row = {"file": str(path), "net": net, "image_size": size, "numbers": numbers}
    return row | {"top-1 by class, %": by_class, "channels": channels}


def load_batches(
    file: Checkpoint, size: int, args: argparse.Namespace, runtime: Runtime
) -> tuple[Batches, Sequence[str]]:
    """The images that ``args.data`` names, as this network takes them, and their classes."""
    typed, how = settings.normalisation(args), {"limit": args.limit_batches}
    if args.data in small.DATASETS and args.data != "folder":
        data = small.load_data(args.data, args.data_dir, size)
        about, _ = data.about(args.data, typed, file.meta)
        images, large = data.test, False
    else:
        root = Path(args.data)
        parts = [root / name for name in small.TEST_FOLDERS if (root / name).is_dir()]
        samples, classes = list_images([*parts, root][0])
        large = structure(file.model).net in IMAGENET_NETWORKS or bool(file.meta.get("resize"))
        usual = folders.IMAGENET_NORMALISATION if large else small.CIFAR10_NORMALISATION
        pixels, _ = choose_normalisation(typed, file.meta, usual)
        about = About("imagenet" if large else "folder", classes, size, pixels)
        images = samples if large else small.read_images(samples, size)
    check_classes(file, about, f"--data {args.data}", "name the data that it was trained on")
    how |= {"normalisation": about.normalisation, "runtime": runtime}
    if not large:
        return small.ImageBatches(images, args.bs, **how), about.classes
    crops = folders.Crops.for_baseline(size, file.meta)
    how |= {"crops": crops, "workers": args.workers}
    return folders.FolderBatches(images, args.bs, **how), about.classes


def evaluate(
    model: nn.Module, batches: Batches, classes: int, runtime: Runtime
) -> tuple[Metrics, list[float | None]]:
    """The metrics, and the top-1 accuracy of every class in %; None for one without images."""
    tally, seen, right = RunningMetrics(runtime), torch.zeros(classes), torch.zeros(classes)
    for number, (images, labels) in enumerate(tally.follow(batches, "evaluate"), start=1):
        logits = model(images)
        tally.add(logits, labels, F.cross_entropy(logits, labels), number)
        seen += labels.bincount(minlength=classes).cpu()
        right += labels[logits.argmax(1) == labels].bincount(minlength=classes).cpu()
    tally.check("the evaluation", "weights, running statistics or images are broken")
    pairs = zip(right.tolist(), seen.tolist(), strict=True)
    return tally.metrics(), [100 * hits / count if count else None for hits, count in pairs]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers, accuracies by class and channels by group: a column per file."""
    titles = ("numbers", "top-1 by class, %", "channels")
    width = max(len(name) for title in titles for row in rows for name in (title, *row[title]))
    heads = [f"({i})" for i in range(1, len(rows) + 1)]
    lines = [f"{head} {row['file']}: {row['net']}" for head, row in zip(heads, rows, strict=True)]
    for title in titles:
        names = dict.fromkeys(name for row in rows for name in row[title])
        part = {name: [_cell(row[title].get(name)) for row in rows] for name in names}
        if part:
            lines.append("")
            part = {title: heads, **part}
        lines += [f"{name:{width}}" + "".join(f"{c:>12}" for c in part[name]) for name in part]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):  # channels after and before
        return "/".join(map(str, value))
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
