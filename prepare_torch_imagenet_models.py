"""Turn torchvision's ImageNet weights into the baseline that gfbs_imagenet.py prunes.

    python prepare_torch_imagenet_models.py --net resnet50 --data_dir <path-to-imagenet>
    python prepare_torch_imagenet_models.py --net resnet50 --checkpoint resnet50-0676ba61.pth

Takes weights of torchvision (downloaded once), a local file of such weights, or the weights of your
own network (--net package.module:factory). Checks that a gated network gives torchvision's logits,
writes OUTPUT/<net>/model_best.pth, and evaluates it on DATA_DIR/val if given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models import IMAGENET_NETWORKS, GatedModel, build_model, group_widths, structure
from utils.checkpoint import Checkpoint, load_checkpoint, read_state_dict, save_checkpoint
from utils.checkpoint.rebuild import load_traced
from utils.cli import flags, settings
from utils.cli.parser import Parser, run_script
from utils.data.batches import About, Normalisation, choose_normalisation
from utils.data.folders import IMAGENET_NORMALISATION, Crops, FolderBatches
from utils.data.listing import list_images
from utils.distributed import select_runtime
from utils.errors import InputError
from utils.files import writable
from utils.finetune import evaluate
from utils.run.baseline import check_classes

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser, imagenet=True)
    flags.add_conversion_flags(parser)
    flags.add_normalisation_flags(parser)
    flags.add_device_flags(parser)
    args = parser.parse_args(argv)
    settings.check_normalisation(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Convert, check, save and evaluate; returns what was measured on DATA_DIR/val."""
    runtime = select_runtime(args.device, args.gpu)
    runtime.share(args.batch_size, "--batch_size")
    report = partial(print, flush=True) if runtime.is_main else lambda text: None
    weights = None if ":" in args.net else named_weights(args.net, args.weights)
    crops, usual = preset(weights, args.image_size)
    normalisation, constants = choose_normalisation(settings.normalisation(args), {}, usual)
    val = list_images(Path(args.data_dir) / "val") if args.data_dir else None
    state, source = None, args.net
    if args.checkpoint or weights:
        state = runtime.main_first(lambda: read_weights(args.checkpoint, weights))
        source = args.checkpoint or weights.url
    model, said = convert(args.net, state, source, crops.size)
    report(said)
    how = crops.resize, crops.interpolation, source
    about = About("imagenet", (), crops.size, normalisation, *how)
    if val:
        advice = "name the data that the weights were trained on"
        there, baseline = replace(about, classes=val[1]), Checkpoint(model, {})
        check_classes(baseline, there, f"--data_dir {args.data_dir}", advice)
    report(constants)
    if args.save:
        path = Path(args.output) / args.net.replace(":", "-") / "model_best.pth"
        runtime.on_main(lambda: save(path, model, args.overwrite, about.metadata()))
        report(f"saved {path}")
    if not val:
        return {}
    how = {"workers": args.workers, "limit": args.limit_val_batches, "normalisation": normalisation}
    with closing(FolderBatches(val[0], args.batch_size, crops, runtime, **how)) as batches:
        found = evaluate(model, batches, runtime)
    figures = "top-1 {:.3f} %, top-5 {:.3f} %"
    measured = figures.format(found.accuracy, found.top5)
    report(f"measured on {found.images} images of {args.data_dir}/val: {measured}")
    if weights:
        said = weights.meta["_metrics"]["ImageNet-1K"]
        published = figures.format(said["acc@1"], said["acc@5"])
        where = f"for {weights}, on 50000 images of ImageNet's val"
        report(f"torchvision publishes {where}: {published}")
    return {"accuracy": found.accuracy, "top5": found.top5, "images": found.images}


def named_weights(net: str, name: str) -> WeightsEnum:
    """torchvision's weights of this name. Raises InputError, with the names, if there are none."""
    from torchvision.models import get_model_weights

    known = get_model_weights(net).__members__
    if name not in known:
        raise InputError(f"--weights {name}: {net} has {', '.join(known)}")
    return known[name]


def preset(weights: WeightsEnum | None, size: int | None) -> tuple[Crops, Normalisation]:
    """How images are prepared for these weights; as usual on ImageNet if there are none."""
    if weights is None:
        return Crops.for_baseline(size or Crops.size, {}), IMAGENET_NORMALISATION
    said = weights.transforms()
    meta = {"image_size": said.crop_size[0], "resize": said.resize_size[0]}
    meta["interpolation"] = said.interpolation.value
    normalisation = Normalisation(tuple(said.mean), tuple(said.std))
    return Crops.for_baseline(size or meta["image_size"], meta), normalisation


def read_weights(file: str | None, weights: WeightsEnum) -> Mapping[str, Tensor]:
    """The state dict of a local file, or else from torchvision's cache or the network."""
    if file:
        return read_state_dict(file)
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        name, cache = Path(weights.url).name, Path(torch.hub.get_dir()) / "checkpoints"
        advice = f"put {name} into {cache}, or name a local file with --checkpoint"
        raise InputError(f"{weights.url} could not be downloaded ({error}); {advice}") from error


def convert(
    net: str, state: Mapping[str, Tensor] | None, source: str, size: int
) -> tuple[nn.Module, str]:
    """The network to prune with these weights, and a line about it.

    Without weights, a factory's network keeps its own. Raises InputError for weights of another
    network, and if the logits of a gated network differ from torchvision's by more than rounding.
    """
    if net in IMAGENET_NETWORKS:
        model, difference = convert_gated(net, state, source)
        return model, f"{net}: gated logits equal torchvision's (they differ by {difference:g})"
    try:
        if state is None:
            model = build_model(net, image_size=size)
        else:
            auxiliary = ("AuxLogits.", "aux1.", "aux2.")
            own = {name: value for name, value in state.items() if not name.startswith(auxiliary)}
            model = load_traced(net, own, size)
    except ValueError as error:
        culprit = source if state else f"--net {net}"
        raise InputError(f"{culprit}: {error}") from error
    widths = group_widths(model).values()
    notes = "".join(f"\nnote: {note}" for note in structure(model).notes)
    return model, f"{net}: {sum(widths)} channels in {len(widths)} groups can go{notes}"


def convert_gated(net: str, state: Mapping[str, Tensor], source: str) -> tuple[GatedModel, float]:
    """A network of ours with torchvision's weights, and the relative difference of its logits."""
    from torchvision.models import get_model

    try:
        num_classes = len(state["fc.weight"])
        original = get_model(net, weights=None, num_classes=num_classes).eval()
        original.load_state_dict(state)
        model = build_model(net, num_classes).eval()
        gates = {name: gate for name, gate in model.state_dict().items() if name.endswith(".gate")}
        model.load_state_dict({**gates, **state})
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{source}: not torchvision's weights of {net} ({error})") from None
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = original(images), model(images)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= 1e-5:
        raise InputError(f"{source}: the gated {net} differs from torchvision's by {difference:g}")
    return model, difference


def save(path: Path, model: nn.Module, overwrite: bool, meta: Mapping[str, Any]) -> None:
    """Write the baseline. Raises InputError rather than replace other weights unasked."""
    with writable(path, "--output"):
        if overwrite or not path.exists():
            save_checkpoint(path, model, **meta)
        elif load_checkpoint(path, structure(model).net).digest != Checkpoint(model, {}).digest:
            raise InputError(f"{path} holds other weights; use --overwrite to replace them")


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
