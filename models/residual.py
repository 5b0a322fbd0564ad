"""Residual networks: their layers, and which groups a stage of ``--smooth`` cuts."""

from torch import nn

from models.gate import Gate
from models.gated import GatedModel


def add_layer(
    module: nn.Module, k: int, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> None:
    """Add a convolution ``conv{k}`` without bias, a norm ``bn{k}`` and a gate ``gate{k}``."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    module.add_module(f"conv{k}", conv)
    module.add_module(f"bn{k}", nn.BatchNorm2d(c_out))
    module.add_module(f"gate{k}", Gate(c_out))


class ResidualBlock(nn.Module):
    """``conv{k} bn{k} gate{k}`` for k = 1, 2, ...; the last gate stands behind the addition."""


class ResidualModel(GatedModel):
    """A network of ``ResidualBlock``s."""

    def _blocks(self) -> dict[str, ResidualBlock]:
        """Name -> block, in forward order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, ResidualBlock)}

    def checkpoint_blocks(self) -> list[nn.Module]:
        return list(self._blocks().values())

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """One stage per block: its inner groups, and every stream to which it is the first to add.

        If no block adds to a stream (the stem), the first block that reads it owns it. A group that
        no block touches is a stage of its own.
        """
        stages: dict[str, list[str]] = {f"{block}.": [] for block in self._blocks()}
        for group in self.channel_groups():
            layers = (*group.gates, *group.inputs)
            blocks = (b for layer in layers for b in stages if layer.startswith(b))
            stages.setdefault(next(blocks, group.name), []).append(group.name)
        return [tuple(stage) for stage in stages.values()]
