"""Convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .common import Residual, architecture, classified, images, real, regressed

Tensor = torch.Tensor


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, padding=2),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 10),
        nn.Sigmoid(),
        nn.Linear(10, 5),
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    )


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, added to a shortcut in place, as torchvision does it."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and ins == outs
            else nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))
        )

    def forward(self, x: Tensor) -> Any:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        ResidualBlock(4, 4, 1),
        ResidualBlock(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class DenseLayer(nn.Module):
    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(ins), nn.Conv2d(ins, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        DenseLayer(4, 2),
        DenseLayer(6, 2),
        DenseLayer(8, 2),
        nn.BatchNorm2d(10),
        nn.Conv2d(10, 5, 1),
        nn.AvgPool2d(2),
        nn.Flatten(2),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
    )


def mobilenet() -> nn.Module:
    def inverted(width: int, hidden: int) -> nn.Module:
        return Residual(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        inverted(4, 8),
        inverted(4, 8),
        Squeeze(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


class Squeeze(nn.Module):
    """Squeeze and excitation: channels weighted by what they hold on the whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Any:
        weight = F.hardsigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return x.mul(weight)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.LeakyReLU(0.1))
        self.down2 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.ELU())
        self.bottom = nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, dilation=2), nn.Mish())
        self.up2, self.join2 = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 3, 3, padding=1)
        self.join1 = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        up = self.up2(self.bottom(F.max_pool2d(two, 2)))
        up = F.relu(self.join2(torch.cat([up, two], 1)))
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.join1(torch.cat([up, one], 1))


def segmented(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Cross entropy of each pixel, and one minus the Dice coefficient."""
    scores = model(x)
    dice = (scores.softmax(1)[:, 1] * y).sum() * 2 / (scores.softmax(1)[:, 1].sum() + y.sum() + 1)
    return F.cross_entropy(scores, y) + 1 - dice


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, (1, 3), padding=(0, 1)))
        self.five = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 5, padding="same", padding_mode="reflect"))
        self.pool = nn.Conv2d(3, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        pooled = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1, count_include_pad=False)
        branches = [self.one(x), self.three(x), self.five(x), self.pool(pooled)]
        return self.head(F.relu(self.norm(torch.cat(branches, 1))).amax((2, 3)))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.PReLU(3),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.PReLU(),
        nn.ConvTranspose2d(3, 1, 2, stride=2),
        nn.Sigmoid(),
    )


class Superresolution(nn.Module):
    """Pixels moved out of the channels, as the sub-pixel convolution does, around a shifted window."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x)).roll((1, -1), (2, 3))
        return F.pixel_shuffle(self.last(hidden), 2) + F.interpolate(x, scale_factor=2, mode="nearest")


class TemporalConvolutions(nn.Module):
    """A WaveNet: dilated causal convolutions over a sequence, each gated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3, 6, 2, dilation=2**i) for i in range(3))
        self.head = nn.Conv1d(3, 5, 1)

    def forward(self, x: Tensor) -> Any:
        skips = []
        for i, layer in enumerate(self.layers):
            value, gate = layer(F.pad(x, (2**i, 0))).chunk(2, 1)
            x = x + value.tanh() * gate.sigmoid()
            skips.append(x)
        return self.head(torch.stack(skips).sum(0)).mean(2)


class Volumes(nn.Module):
    """Convolutions over a video."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.adaptive_avg_pool3d(F.max_pool3d(F.gelu(self.norm(self.conv(x))), 2), 1).flatten(1))


ARCHITECTURES = [
    architecture("LeNet", lenet, images(1, 12), classified),
    architecture("VGG", vgg, images(3, 10), classified),
    architecture("ResNet", resnet, images(3, 8), classified),
    architecture("DenseNet", densenet, images(3, 6), classified),
    architecture("MobileNet", mobilenet, images(3, 8), classified),
    architecture("U-Net", UNet, lambda: (real(2, 1, 8, 8), torch.randint(2, (2, 8, 8))), segmented),
    architecture("Inception", Inception, images(3, 6), classified),
    architecture(
        "convolutional autoencoder", autoencoder, lambda: (real(3, 1, 8, 8),), lambda model, x: F.l1_loss(model(x), x)
    ),
    architecture("super-resolution", Superresolution, lambda: (real(2, 1, 5, 5), real(2, 1, 10, 10)), regressed),
    architecture("WaveNet", TemporalConvolutions, lambda: (real(3, 3, 9), torch.randint(5, (3,))), classified),
    architecture("3-d convolutions", Volumes, lambda: (real(2, 1, 5, 5, 5), torch.randint(5, (2,))), classified),
]
