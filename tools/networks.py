"""Try every classifier of torchvision that has BatchNorm, and twenty networks of timm.

    python -m tools.networks docs/networks.md

What stands below a heading in the page stays. Half of the channels go, chosen at random. The pruned
network must compute what the masked one does, in float64. Needs requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from models import channel_groups, from_torchvision, structure, torchvision_networks
from models.trace import trace
from tools import export
from tools.measures import with_torch_pruning
from utils.cli.parser import Parser, run_script
from utils.cost import model_cost
from utils.files import write_text
from utils.pruning import select_channels
from utils.saliency import channel_saliency
from utils.surgery import prune

TIMM = """
    cspdarknet53 cspresnet50 densenet121 dla34 dpn68 ecaresnet26t efficientnet_lite0
    ese_vovnet19b_dw fbnetc_100 ghostnet_100 hrnet_w18_small lcnet_050 mixnet_s
    mobilenetv3_large_100 regnetx_002 res2net50_26w_4s resnet50d rexnet_100 seresnet50
    tf_efficientnetv2_b0"""
EXPORTED = """
    densenet121 efficientnet_b0 googlenet inception_v3 mnasnet1_0 mobilenet_v2 mobilenet_v3_small
    regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x1_0 vgg11_bn"""
WITHOUT_NORM = re.compile("alexnet|convnext|squeezenet|swin|vit|vgg[0-9]+$")
MAKERS = (_ConvNd, nn.Linear)
OTHER_SIZES = {"inception_v3": 75, "maxvit_t": 224}
TITLE = """# Networks without gates

Written by `python -m tools.networks {page}`, with torch {torch} on the CPU. Weights are random; the
input has 64x64 pixels (inception_v3: 75, maxvit_t: 224). *Free* is the share of the channels that
convolutions and linear layers make, but for the classifier, that can go. The rest is at `--p 0.5
--criterion random`: MACs and parameters that are left, and the largest difference between the
logits of the pruned and of the masked network, in float64, divided by the largest logit.
*Exported*: the largest difference of the logits of the pt2 file, in float32. *Torch-Pruning*:
whether its BasePruner with GroupTaylorImportance cuts the same network at the same ratio and the
result runs, or its error.

| network | free | MACs left | parameters left | pruned - masked | exported | Torch-Pruning |
| --- | --- | --- | --- | --- | --- | --- |
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.networks")
    parser.add_argument("page", help="the Markdown file to write")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the page, anew after every network."""
    names = [name for name in torchvision_networks() if not WITHOUT_NORM.match(name)]
    names += [f"timm:{name}" for name in TIMM.split()]
    page = Path(args.page)
    _, heading, below = (page.read_text() if page.exists() else "").partition("\n## ")
    text, exact = TITLE.format(page=args.page, torch=torch.__version__), 0
    for name in names:
        ours, theirs = apart(cut_in_half, name), apart(cut_by_torch_pruning, name)
        if len(ours) == 1:  # an error
            ours += ["-"] * 4
        text += f"| {' | '.join([name, *ours, *theirs])} |\n"
        exact += "exact" in ours[3]
        print(name, *ours, *theirs, sep="  ", flush=True)
        said = f"{exact} of {len(names)} are exact (below 1e-10)."
        write_text(page, f"{text}\n{said}\n{heading}{below}")


def apart(measure: Callable[[str], list[str]], name: str) -> list[str]:
    """The cells of a row, from a process of its own: it gives its memory back, and may crash."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(measure, name).result()
        except BrokenProcessPool:
            return ["its process was killed"]
        except Exception as error:
            said = " ".join(str(error).split())[:90].replace("|", "/")
            return [f"{type(error).__name__}: {said}"]


def network_of(name: str) -> tuple[nn.Module, int]:
    """A network with random weights, and the side of its images."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=False), 64
    return from_torchvision(name), OTHER_SIZES.get(name, 64)


def cut_in_half(name: str) -> list[str]:
    """Trace, mask and prune."""
    model, size = network_of(name)
    model = trace(model, torch.empty(1, 3, size, size), name).double().eval()
    head, groups, before = structure(model).head, channel_groups(model), model_cost(model, size)
    layers = {n: m for n, m in model.named_modules() if n != head and isinstance(m, MAKERS)}
    made = sum(m.weight.shape[getattr(m, "transposed", 0)] for m in layers.values())
    free = sum(g.outputs[n].numel() for g in groups for n in layers if n in g.outputs)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    saliency = channel_saliency(model, images, None, criterion="random")
    plan = select_channels(groups, saliency, 0.5)
    with torch.no_grad():
        expected = plan.apply_mask(model)(images)
        found = prune(model, plan)(images)  # of what was masked only zeros go
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    after, in_file = model_cost(model, size), ""
    if name in EXPORTED.split():
        network, _ = export.exported(model, size, "pt2")
        in_file = f"{export.largest_difference(model, network, size):.0e}"
    return [
        f"{100 * free / made:.0f} %",
        f"{100 * after.macs / before.macs:.0f} %",
        f"{100 * after.params / before.params:.0f} %",
        f"{'exact' if difference < 1e-10 else 'differs'}, {difference:.0e}",
        in_file,
    ]


def cut_by_torch_pruning(name: str) -> list[str]:
    """Whether Torch-Pruning cuts the same network, and the result still runs."""
    model, size = network_of(name)
    trace(model, torch.empty(1, 3, size, size), name)  # names the classifier
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    pruned = with_torch_pruning(model, images, labels).eval()
    with torch.no_grad():
        pruned(images)
    return ["runs"]


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
