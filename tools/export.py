"""Export a checkpoint as the network that is deployed, pruned or not.

    python -m tools.export checkpoints/gatevgg16/gfbs_p0.7_seed1/last.pth
    python -m tools.export checkpoints/gatevgg16/model_best.pth --format onnx

pt2 needs torch alone to be loaded, torch.export.load(FILE).module(), and none of this project; onnx
needs requirements-export.txt. Gates are dropped and BatchNorm is folded into the convolutions; the
batch can have any size. A file is kept only if its logits are those of the checkpoint. FILE.json
beside it says how images go in and what comes out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from models.gate import GatedModel
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli.parser import Parser, count, run_script
from utils.cost import model_cost
from utils.deploy import deployable
from utils.errors import InputError, RunError
from utils.files import write_atomically, write_json

TOLERANCE = 1e-5  # max |a - b| / max |a|
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.export")
    parser.add_argument("checkpoint", help="a checkpoint of any kind that this project loads")
    parser.add_argument("--format", choices=tuple(FORMATS), default="pt2", help="of the file")
    parser.add_argument("--output", metavar="FILE", help="(default: beside the checkpoint)")
    parser.add_argument(
        "--image_size",
        type=count,
        metavar="PIXELS",
        help="side of the images (default: as the checkpoint says)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Export, verify, write; returns what FILE.json says."""
    source = Path(args.checkpoint)
    checkpoint = load_checkpoint(source)
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
    description = describe(checkpoint, source, size)

    content, run = FORMATS[args.format](deployable(checkpoint.model), size)
    difference = largest_difference(checkpoint.model, run, size)
    if not difference <= TOLERANCE:
        raise RunError(
            f"{source}: the exported network's logits differ by {difference:.1e} of the largest,"
            f" more than {TOLERANCE:g}; nothing is written"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: file.write(content))
        write_json(about, description)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}); see --output") from error
    print(f"{target}: {len(content) / 1e6:.2f} MB, logits differ by {difference:.1e}; {about}")
    return description


def describe(checkpoint: Checkpoint, source: Path, size: int) -> dict[str, Any]:
    """What a user has to know: input, output, cost, and where it comes from."""
    model, meta = checkpoint.model, checkpoint.meta
    cost = model_cost(model, size)
    return {
        "net": model.net,
        "input": {
            "name": "images", "shape": ["batch", 3, size, size], "type": "float32",
            "normalisation": meta.get("normalisation"),
        },
        "output": {"name": "logits", "shape": ["batch", model.num_classes]},
        "classes": meta.get("classes"),
        "macs": cost.macs,
        "params": cost.params,
        "accuracy": meta.get("accuracy"),
        "tested_on": meta.get("tested_on", "test"),
        "source": {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "torch": torch.__version__,
    }  # fmt: skip


def largest_difference(model: GatedModel, run: Callable[[Tensor], Tensor], size: int) -> float:
    """max |a - b| / max |a| between the checkpoint's logits and the export's, at several batch
    sizes, on noise of the mean and the deviation of normalised images.
    """
    stream = torch.Generator().manual_seed(0)
    model, worst = model.float().eval(), 0.0
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, size, size, generator=stream)
        with torch.no_grad():
            expected, logits = model(images), run(images)
        if logits.shape != expected.shape or not logits.isfinite().all():
            return float("inf")
        difference = ((expected - logits).abs().max() / expected.abs().max()).item()
        if math.isnan(difference):  # logits of nothing but zeros say nothing
            return float("inf")
        worst = max(worst, difference)
    return worst


def to_pt2(network: GraphModule, size: int) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """The file's content, and the network read back from it."""
    images = torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Weights that lie pixel by pixel are stored whole, whatever torch says of them.
        warnings.filterwarnings("ignore", "No complete tensor found")
        file = Path(folder) / "network.pt2"
        batch = torch.export.Dim("batch")
        program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, file)
        return file.read_bytes(), torch.export.load(file).module()


def to_onnx(network: GraphModule, size: int) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """The file's content, and the network as onnxruntime reads it."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt"
        )
    import onnxruntime

    images = torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(
            network, (images,), file, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        content = file.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


FORMATS = {"pt2": to_pt2, "onnx": to_onnx}

if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
