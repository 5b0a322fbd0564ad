"""Small networks without gates, one for each rule of the trace. All take (B, 3, 16, 16)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def layer(c_in, c_out, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), activation())


class Classifier(nn.Module):
    """``features``, spatial mean, ``fc``."""

    def __init__(self, width, num_classes=5):
        super().__init__()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Branches(Classifier):
    """Branches of different widths, concatenated, with a residual around the concatenation."""

    def __init__(self):
        super().__init__(12)
        self.stem, self.a, self.b = layer(3, 12), layer(12, 8, 1), layer(12, 4)
        self.unused = layer(12, 6)

    def features(self, x):
        x = self.stem(x)
        self.unused(x)
        return x + torch.cat([self.a(x), self.b(x)], 1)


class Shuffle(Classifier):
    """Grouped convolutions, and a channel shuffle by hand."""

    def __init__(self):
        super().__init__(12)
        self.a, self.b = layer(3, 12), layer(12, 12, groups=3)
        self.c = nn.Sequential(layer(12, 12, groups=12), layer(12, 12, 1, groups=2))

    def features(self, x):
        x = self.b(self.a(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 3, channels // 3, height, width).transpose(1, 2)
        return self.c(x.reshape(batch, channels, height, width))


class Halves(Classifier):
    """As in ShuffleNet v2: one half of the channels goes past a branch."""

    def __init__(self):
        super().__init__(16)
        self.a, self.b = layer(3, 16), layer(8, 8)
        self.shuffle = nn.ChannelShuffle(2)

    def features(self, x):
        a, b = self.a(x).chunk(2, dim=1)
        return self.shuffle(torch.cat((a, self.b(b)), dim=1))


class Excite(Classifier):
    """Squeeze and excitation, depthwise with a multiplier, swish, and a learned scale."""

    def __init__(self):
        super().__init__(16)
        self.a, self.b = layer(3, 8, activation=nn.SiLU), layer(8, 16, groups=8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.c = layer(16, 16, activation=nn.Hardswish)

    def features(self, x):
        x = self.b(self.a(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.c(x * torch.sigmoid(gate))


class PreActivation(Classifier):
    """Norms before convolutions, dense concatenation, PReLU, and dropout."""

    def __init__(self):
        super().__init__(14)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.act1, self.conv1 = nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 8, 1)
        self.norm2, self.act2 = nn.BatchNorm2d(14), nn.PReLU()

    def features(self, x):
        x = self.conv(x)
        x = torch.cat([x, F.dropout(self.conv1(self.act1(self.norm1(x))), 0.0)], 1)
        return self.act2(self.norm2(x))


class UNet(nn.Module):
    """Down, up by transposed convolution and by interpolation, with skips; an image comes out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = layer(3, 6), layer(6, 8, stride=2), layer(8, 10, stride=2)
        self.up, self.norm = nn.ConvTranspose2d(10, 8, 2, 2), nn.BatchNorm2d(8)
        self.d, self.e = layer(16, 8), nn.Conv2d(14, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        up = F.relu(self.norm(self.up(self.c(b))))
        d = self.d(torch.cat([b, up], 1))
        return self.e(torch.cat([a, F.interpolate(d, scale_factor=2.0)], 1))


class Flattened(nn.Module):
    """A 4x4 map before the classifier, with BatchNorm1d behind it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(layer(3, 8, stride=2), layer(8, 6, stride=2), nn.Flatten())
        self.norm, self.hidden = nn.BatchNorm1d(96), nn.Linear(96, 7)
        self.norm2, self.fc = nn.BatchNorm1d(7), nn.Linear(7, 5)

    def forward(self, x):
        x = self.features(x).view(x.size(0), -1)
        return self.fc(F.relu(self.norm2(self.hidden(F.relu(self.norm(x))))))


class Twice(Classifier):
    """One layer runs twice. Its norms do not: they are apart."""

    def __init__(self):
        super().__init__(8)
        self.a, self.conv = layer(3, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.b = layer(8, 8)

    def features(self, x):
        x = F.relu(self.norm1(self.conv(self.a(x))))
        return self.b(F.relu(self.norm2(self.conv(x))))


class Written(Classifier):
    """Numbers that are written into the forward pass: these channels stay, others go."""

    def __init__(self):
        super().__init__(16)
        self.a, self.b, self.c, self.d = layer(3, 8), layer(8, 12), layer(12, 16), layer(16, 16)

    def features(self, x):
        x = self.b(self.a(x))  # b is counted below, a is free
        x = F.pad(self.c(x.view(x.size(0), 12, 16, 16))[:, :16], (1, 1, 1, 1))
        return self.d(x)


class Own(nn.Conv2d):
    """A subclass with a forward pass of its own, as for weights that are standardised."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Foreign(Classifier):
    """Operations that the trace does not know: GroupNorm, a layer of its own, attention."""

    def __init__(self):
        super().__init__(8)
        self.a, self.own, self.b = layer(3, 8), Own(8, 8, 3), layer(8, 8)
        self.group_norm, self.c, self.d = nn.GroupNorm(2, 8), layer(8, 6), layer(6, 8)

    def features(self, x):
        x = self.group_norm(self.b(self.own(self.a(x))))
        x = self.d(self.c(x))
        return (
            x
            * (x.flatten(2) @ x.flatten(2).transpose(1, 2))
            .softmax(-1)
            .mean((1, 2))[:, None, None, None]
        )


class Constant(Classifier):
    """Behind a sigmoid or a constant a masked channel is not 0; a norm makes it 0 again."""

    def __init__(self):
        super().__init__(8)
        self.a, self.b = layer(3, 8, activation=nn.Sigmoid), layer(8, 8)
        self.c, self.norm, self.d = layer(8, 8), nn.BatchNorm2d(8), layer(8, 8)

    def features(self, x):
        x = self.c(self.b(self.a(x)) * 2)
        return self.d(self.norm(1 - x).relu())


class Conv1d(nn.Module):
    """Sequences, by Conv1d; the pixels are read row by row."""

    def __init__(self):
        super().__init__()
        conv = [nn.Conv1d(3, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 5, 2, 2)]
        self.features = nn.Sequential(*conv, nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.features(x.flatten(2)).mean(-1))


class DnCNN(nn.Module):
    """Denoising by residual learning: convolution, BatchNorm, ReLU; the output is an image."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        middle = [part for _ in range(depth) for part in layer(width, width)]
        ends = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.layers = nn.Sequential(ends[0], nn.ReLU(), *middle, ends[1])

    def forward(self, x):
        return x - self.layers(x)


NETWORKS = [Branches, Shuffle, Halves, Excite, PreActivation, UNet, Flattened, Twice, Written]
NETWORKS += [Foreign, Constant, Conv1d, DnCNN]


def mine(num_classes=5):
    """A factory, as ``networks:mine``."""
    network = Branches()
    network.fc = nn.Linear(12, num_classes)
    return network
