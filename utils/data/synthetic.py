"""A procedural ten-class set of images: learnable, not trivial, made in about a second."""

from __future__ import annotations

import torch
from torch import Tensor

# By class, whether (u, v) lies in its shape, which fills about [-1, 1]; ``far`` is max(|u|, |v|).
SHAPES = {
    "disc": lambda u, v, far: u**2 + v**2 < 0.8,
    "ring": lambda u, v, far: (u**2 + v**2 < 0.9) & (u**2 + v**2 > 0.4),
    "square": lambda u, v, far: far < 0.75,
    "frame": lambda u, v, far: (far < 0.85) & (far > 0.5),
    "triangle": lambda u, v, far: (v > -0.8) & (v + 2 * u.abs() < 0.8),
    "plus": lambda u, v, far: (torch.minimum(u.abs(), v.abs()) < 0.25) & (far < 0.9),
    "cross": lambda u, v, far: (((u - v).abs() < 0.35) | ((u + v).abs() < 0.35)) & (far < 0.85),
    "bars": lambda u, v, far: ((3 * u).remainder(2) < 1) & (far < 1),
    "stripes": lambda u, v, far: ((3 * v).remainder(2) < 1) & (far < 1),
    "checker": lambda u, v, far: (((2 * u).floor() + (2 * v).floor()).remainder(2) < 1) & (far < 1),
}


def synthetic_images(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) uint8 and labels (count,), equally many of each class.

    Each shows a shape of random place, scale, tilt and colour on a random background, under noise.
    """
    stream = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=stream)

    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=stream)]
    grid = torch.linspace(-1, 1, size)
    x = grid.view(1, 1, size) - uniform(-0.35, 0.35, 1, 1)
    y = grid.view(1, size, 1) - uniform(-0.35, 0.35, 1, 1)
    tilt, scale = uniform(-0.3, 0.3, 1, 1), uniform(0.35, 0.8, 1, 1)
    u = (x * tilt.cos() + y * tilt.sin()) / scale
    v = (y * tilt.cos() - x * tilt.sin()) / scale
    far = torch.maximum(u.abs(), v.abs())
    shape = torch.empty(count, size, size, dtype=torch.bool)
    for label, inside in enumerate(SHAPES.values()):
        mine = labels == label
        shape[mine] = inside(u[mine], v[mine], far[mine])
    ink, paper = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    images = torch.where(shape[:, None], ink, paper)
    images += 40 * torch.randn(images.shape, generator=stream)
    return images.clamp_(0, 255).to(torch.uint8), labels
