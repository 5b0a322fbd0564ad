"""A procedural ten-class set of images: learnable, not trivial, made in about a second."""

from __future__ import annotations

import torch
from torch import Tensor

# Each class is a shape, as an indicator over coordinates (u, v) in which the shape fills about [-1,
# 1].
_SHAPES = {
    "disc": lambda u, v: u**2 + v**2 < 0.8,
    "ring": lambda u, v: ((u**2 + v**2) < 0.9) & ((u**2 + v**2) > 0.4),
    "square": lambda u, v: (u.abs() < 0.75) & (v.abs() < 0.75),
    "frame": lambda u, v: (
        (torch.maximum(u.abs(), v.abs()) < 0.85) & (torch.maximum(u.abs(), v.abs()) > 0.5)
    ),
    "triangle": lambda u, v: (v > -0.8) & (v + 2 * u.abs() < 0.8),
    "plus": lambda u, v: (
        (torch.minimum(u.abs(), v.abs()) < 0.25) & (torch.maximum(u.abs(), v.abs()) < 0.9)
    ),
    "cross": lambda u, v: (
        (((u - v).abs() < 0.35) | ((u + v).abs() < 0.35)) & (torch.maximum(u.abs(), v.abs()) < 0.85)
    ),
    "bars": lambda u, v: ((3 * u).remainder(2) < 1) & (torch.maximum(u.abs(), v.abs()) < 1),
    "stripes": lambda u, v: ((3 * v).remainder(2) < 1) & (torch.maximum(u.abs(), v.abs()) < 1),
    "checker": lambda u, v: (
        (((2 * u).floor() + (2 * v).floor()).remainder(2) < 1)
        & (torch.maximum(u.abs(), v.abs()) < 1)
    ),
}
SYNTHETIC_CLASSES = tuple(_SHAPES)


def synthetic_images(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` images (N, 3, size, size) uint8 and their labels (N,), as many of each class.

    A shape of random place, scale, tilt and colour on a random background, under noise.
    """
    stream = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=stream)

    labels = (torch.arange(count) % len(_SHAPES))[torch.randperm(count, generator=stream)]
    grid = torch.linspace(-1, 1, size)
    x = grid.view(1, 1, size) - uniform(-0.35, 0.35, 1, 1)
    y = grid.view(1, size, 1) - uniform(-0.35, 0.35, 1, 1)
    tilt, scale = uniform(-0.3, 0.3, 1, 1), uniform(0.35, 0.8, 1, 1)
    u = (x * tilt.cos() + y * tilt.sin()) / scale
    v = (y * tilt.cos() - x * tilt.sin()) / scale
    shape = torch.empty(count, size, size, dtype=torch.bool)
    for label, inside in enumerate(_SHAPES.values()):
        mine = labels == label
        shape[mine] = inside(u[mine], v[mine])
    ink, paper = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    images = torch.where(shape[:, None], ink, paper)
    images += 40 * torch.randn(images.shape, generator=stream)
    return images.clamp_(0, 255).to(torch.uint8), labels
