"""Compact versions of the architectures that people train, written in plain ``torch.nn``: a file a family.

Each is an `Architecture`: a maker of the model, of random data (new at each call), and the loss. They are kept
small enough to be trained for a few steps in a test, with every kind of layer that the family is known for.
"""

from __future__ import annotations

from . import attention, convolutional, differential, generative, graphs, plain, recurrent
from .common import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: list[Architecture] = [
    *plain.ARCHITECTURES,
    *convolutional.ARCHITECTURES,
    *recurrent.ARCHITECTURES,
    *attention.ARCHITECTURES,
    *graphs.ARCHITECTURES,
    *generative.ARCHITECTURES,
    *differential.ARCHITECTURES,
]
