"""Loss and accuracy, summed batch by batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.distributed import Runtime
from utils.errors import RunError
from utils.progress import progress


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy, top-1 and top-5 accuracy (per cent) over ``images`` images."""

    loss: float
    accuracy: float
    top5: float
    images: int

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} % of {self.images} images right, loss {self.loss:.3f}"


class RunningMetrics:
    """Sums of loss and hits, kept on the device so that no batch waits for a transfer."""

    def __init__(self, runtime: Runtime, sums: list[float] | None = None):
        self.runtime = runtime
        exact = torch.float32 if runtime.device.type == "mps" else torch.float64
        # Loss, top-1 hits, top-5 hits, images. ``sums`` are of all ranks, so one of them adds them.
        start = sums if sums is not None and runtime.is_main else [0.0] * 4
        self.sums = torch.tensor(start, dtype=exact, device=runtime.device)
        self.first_bad = torch.full((), math.inf, dtype=exact, device=runtime.device)

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor, batch: int) -> None:
        best = logits.detach().topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = mean_loss.detach()
        images = self.sums.new_full((), len(labels))
        self.sums += torch.stack([loss * len(labels), hits[:, 0].sum(), hits.sum(), images])
        bad = torch.where(torch.isfinite(loss), math.inf, float(batch))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def all_sums(self) -> list[float]:
        """The four sums, over all ranks."""
        return self.runtime.reduce(self.sums.clone(), "SUM").tolist()

    def metrics(self, everywhere: bool = True) -> Metrics:
        """The metrics of all ranks, or of this one."""
        loss, top1, top5, images = self.all_sums() if everywhere else self.sums.tolist()
        count = max(images, 1)
        return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))

    def check(self, where: str, why: str) -> None:
        """Raise RunError, on every rank, if the loss of a batch was not finite."""
        first = self.runtime.reduce(self.first_bad.clone(), "MIN").item()
        if math.isfinite(first):
            raise RunError(f"the loss is not finite in {where}, batch {first:.0f}: {why}")

    def follow(self, batches: Any, title: str, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that follow batch ``done``, while these metrics are shown."""
        before = int(self.sums[3])

        def status(seconds: float) -> str:
            seen = self.metrics(everywhere=False)
            speed = self.runtime.world_size * (seen.images - before) / seconds
            return f"loss {seen.loss:.3f}, {seen.accuracy:.1f} %, {speed:.0f} images/s"

        return progress(batches, f"{title}, batch", done + len(batches), status, done)
