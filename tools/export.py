"""Export a checkpoint as the network that is deployed, pruned or not.

    python -m tools.export checkpoints/gatevgg16/gfbs_p0.7_seed1/last.pth
    python -m tools.export checkpoints/gatevgg16/model_best.pth --format onnx

To load a pt2 file, torch is enough: torch.export.load(FILE).module(). --format onnx needs
requirements-export.txt. Gates are removed and BatchNorm is folded into the convolutions. A batch
can have any size. The file is written only if its logits are those of the checkpoint. FILE.json
describes input and output; give --mean and --std if the checkpoint does not know them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import structure
from models.gate import deployable
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import flags, settings
from utils.cli.parser import Parser, count, run_script
from utils.cost import model_cost
from utils.data.batches import Normalisation
from utils.errors import InputError, RunError
from utils.files import writable, write_bytes, write_json

TOLERANCE = 1e-5  # max |a - b| / max |a|
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Network = Callable[[Tensor], Tensor]  # images (B, 3, S, S) -> logits (B, classes)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.export")
    parser.add_argument("checkpoint", help="a checkpoint of any kind that this project loads")
    flags.add_loading_flag(parser)
    parser.add_argument("--format", choices=("pt2", "onnx"), default="pt2", help="of the file")
    parser.add_argument("--output", metavar="FILE", help="(default: beside the checkpoint)")
    parser.add_argument("--image_size", type=count, help="in pixels (default: the checkpoint's)")
    flags.add_normalisation_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    settings.check_normalisation(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Export, compare the logits, write; returns the content of FILE.json."""
    source = Path(args.checkpoint)
    checkpoint = load_checkpoint(source, args.net)
    target = Path(args.output) if args.output else source.with_suffix(f".{args.format}")
    about = Path(f"{target}.json")
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is the checkpoint itself; see --output")
    for path in (target, about):
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} is there already; --overwrite replaces it, or see --output")
    size = args.image_size or checkpoint.meta.get("image_size")
    if size is None:
        raise InputError(f"{source} does not say how large its images are; give --image_size")
    description = describe(checkpoint, source, size, settings.normalisation(args))

    network, content = exported(checkpoint.model, size, args.format)
    difference = largest_difference(checkpoint.model, network, size)
    if not difference <= TOLERANCE:
        found = f"logits differ by {difference:.1e} of the largest, more than {TOLERANCE:g}"
        raise RunError(f"{source}: the exported network's {found}; nothing is written")
    with writable(target, "--output"):
        write_bytes(target, content)
        write_json(about, description)
    print(f"{target}: {len(content) / 1e6:.2f} MB, logits differ by {difference:.1e}; {about}")
    return description


def describe(
    checkpoint: Checkpoint, source: Path, size: int, typed: Normalisation | None
) -> dict[str, Any]:
    """What a user has to know: input, output, cost, and where the network comes from."""
    model, meta = checkpoint.model, checkpoint.meta
    cost, digest = model_cost(model, size), hashlib.sha256(source.read_bytes()).hexdigest()
    pixels = {"shape": ["batch", 3, size, size], "type": "float32"}
    pixels["normalisation"] = typed.as_dict() if typed else meta.get("normalisation")
    pixels["resize"] = meta.get("resize")  # of the shorter side, before the crop
    said = {"net": structure(model).net, "input": {"name": "images", **pixels}}
    said |= {"output": {"name": "logits", "shape": ["batch", structure(model).num_classes]}}
    said |= {"classes": meta.get("classes"), **vars(cost), "accuracy": meta.get("accuracy")}
    said |= {"tested_on": meta.get("tested_on", "test"), "torch": torch.__version__}
    return said | {"source": {"file": source.name, "sha256": digest}}


def largest_difference(model: nn.Module, run: Network, size: int) -> float:
    """The largest max |a - b| / max |a| of both networks' logits for noise, over batch sizes.

    Infinite where the logits are all 0, not a number, or of another shape.
    """
    stream, found = torch.Generator().manual_seed(0), []
    model.float().eval()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, size, size, generator=stream)
        with torch.no_grad():
            expected, logits = model(images), run(images)
        if logits.shape != expected.shape:
            return torch.inf
        found.append((expected - logits).abs().max() / expected.abs().max())
    return torch.stack(found).nan_to_num(torch.inf).max().item()


def exported(model: nn.Module, size: int, kind: str) -> tuple[Network, bytes]:
    """A network as it is read back from its file, and the content of the file.

    The network is on the CPU and takes images of ``size`` pixels; ``kind`` is "pt2" or "onnx".
    """
    network, example = deployable(model), torch.randn(2, 3, size, size)
    how = {"args": (example,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network.{kind}"
        if kind == "pt2":
            with warnings.catch_warnings():
                # torch warns about weights in channels_last, but stores them completely.
                warnings.filterwarnings("ignore", "No complete tensor found")
                torch.export.save(torch.export.export(network, **how), file)
        else:
            check_onnx()
            names = {"input_names": ["images"], "output_names": ["logits"]}
            how |= {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(network, f=file, **names, **how)
        return read(file), file.read_bytes()


def read(file: Path, device: torch.device | str = "cpu") -> Network:
    """The network of a .pt2 or .onnx file; ONNX runs on the CPU."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module().to(device)
    check_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.cpu().numpy()})[0])


def check_onnx() -> None:
    """Raise InputError if a package is missing that ONNX files need."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        how = "pip install -r requirements-export.txt"
        raise InputError(f"ONNX needs {', '.join(missing)}: {how}")


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
