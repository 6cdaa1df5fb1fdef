"""Functions of torch that are made of parts: taken apart above torch's autograd, as torch takes them apart below it.

A linear layer is a transpose and a product, and for more than two dimensions two views around them; a convolution is
one overload, of more arguments than the function has. Here each such function is written as its parts. Each part is
run by torch's own function for it, and recorded as the overload that it is. Where torch would do anything else
(numbers of few bits, another device, shapes that do not match, at which it raises its own error), `NotImplemented` is
returned, and the call takes the long way. So it does in a release of torch that takes the function apart otherwise:
that is found out by trying the examples beside each, as `shortcut` finds out what is one overload.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch._C import DispatchKey
from torch._C import _dispatch_tls_set_dispatch_key_excluded as _exclude
from torch._ops import OpOverload

from ..names import user_frame
from ..plans import BATCH_NORM, plan_of
from ..tape import Tape
from .inplace import record_write
from .plain import record_plain
from .state import TENSORS
from .unshared import record_statistics, record_update

__all__ = ["Part", "are_made_so"]

aten = torch.ops.aten
Tensor = torch.Tensor
F = torch.nn.functional

_DTYPES = (torch.float32, torch.float64)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_contiguous = torch._C.TensorBase.is_contiguous  # torch's own: those of Tensor are wrapped while a block is open
_t, _view = torch._C.TensorBase.t, torch._C.TensorBase.view
_add = torch._C.TensorBase.add_
_select, _transpose = torch._C.TensorBase.select, torch._C.TensorBase.transpose
_PYTHON = DispatchKey.Python


class Part:
    """Runs and records one part after the other of a call at `frame`."""

    __slots__ = ("_frame", "_tape")

    def __init__(self, tape: Tape, frame: Any) -> None:
        self._tape = tape
        self._frame = frame

    def __call__(self, overload: OpOverload, function: Any, *args: Any) -> Any:
        """What `function` gives, which is that overload and nothing else."""
        self._frame = frame = user_frame(self._frame)
        return record_plain(self._tape, plan_of(overload), args, function, frame)

    def heard(self, overload: OpOverload, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What `function` gives, which is that overload: of a kind that only the mode records."""
        _exclude(_PYTHON, False)
        try:
            return function(*args, **kwargs)
        finally:
            _exclude(_PYTHON, True)

    def draw(self, overload: OpOverload, *args: Any) -> Any:
        """The first argument, which an overload writes to what it draws."""
        streams = self._tape.streams
        with nullcontext() if streams is None or streams.drawing else streams.draw(args, {}):
            return self.fill(overload, *args)

    def fill(self, overload: OpOverload, *args: Any) -> Any:
        """The first argument, made here, which an overload writes to."""
        result = self.update(overload, overload._op, *args)
        return self.write(overload, *args) if result is NotImplemented else result

    def write(self, overload: OpOverload, *args: Any) -> Any:
        """What an overload gives that writes to its arguments."""
        return record_write(self._tape, overload, plan_of(overload, args), args, {})

    def move(self, overload: OpOverload, function: Any, *args: Any) -> Any:
        """What `function` gives, which is that overload, and moves statistics on, which are among its arguments."""
        result = record_statistics(self._tape, plan_of(overload, args), args, function)
        return self.write(overload, *args) if result is NotImplemented else result

    def update(self, overload: OpOverload, function: Any, *args: Any) -> Any:
        """The first argument, which `function` writes to, which is that overload."""
        return record_update(self._tape, plan_of(overload), args, function, pending=0)


# -- the functions -------------------------------------------------------------------------------------------


def _linear(part: Part, input: Any, weight: Any, bias: Any = None) -> Any:
    if not _alike(input, weight, *(() if bias is None else (bias,))) or weight.ndim != 2 or input.ndim < 2:
        return NotImplemented
    shape, (rows, columns) = input.shape, weight.shape
    if shape[-1] != columns or (bias is not None and bias.shape != (rows,)):
        return NotImplemented
    flat = input.ndim == 2
    if not flat:
        if bias is None or not _contiguous(input):
            return NotImplemented
        input = part(aten.view.default, _view, input, [input.numel() // columns, columns])
    turned = part(aten.t.default, _t, weight)
    if bias is None:
        return part(aten.mm.default, torch.mm, input, turned)
    made = part(aten.addmm.default, torch.addmm, bias, input, turned)
    return made if flat else part(aten.view.default, _view, made, [*shape[:-1], rows])


def _convolution(
    dims: int, part: Part, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: Any = 1,
) -> Any:  # fmt: skip
    if not _alike(input, weight, *(() if bias is None else (bias,))) or not input.ndim == weight.ndim == dims + 2:
        return NotImplemented
    for each in (stride, padding, dilation):
        if type(each) is not tuple or len(each) != dims:
            return NotImplemented
    given = (input, weight, bias, [*stride], [*padding], [*dilation], False, [0] * dims, groups)
    return part(aten.convolution.default, torch.convolution, *given)


def _count(part: Part, *args: Any, **kwargs: Any) -> Any:
    """``x.add_(1)`` of integers: what layers with statistics do at each call."""
    if kwargs or len(args) != 2 or type(args[1]) is not int or type(args[0]) not in TENSORS:
        return NotImplemented
    if args[0].dtype is not torch.int64 or not args[0].is_cpu:
        return NotImplemented
    return part.update(aten.add_.Tensor, _add, *args)


def _batch_norm(
    part: Part, input: Any, mean: Any, var: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any
) -> Any:
    if training is not True or type(momentum) is not float or type(eps) is not float:
        return NotImplemented
    if not _alike(input, mean, var, weight, bias) or input.ndim < 2 or input.numel() == input.shape[1] or eps <= 0:
        return NotImplemented
    channels = input.shape[1:2]
    for each in (mean, var, weight, bias):
        if each.shape != channels:
            return NotImplemented
    return part.move(BATCH_NORM, torch.native_batch_norm, input, weight, bias, mean, var, True, momentum, eps)[0]


def _layer_norm(part: Part, input: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    if not _alike(input, weight, bias) or type(shape) is not tuple or type(eps) is not float:
        return NotImplemented
    if not input.shape[-len(shape) :] == shape == weight.shape == bias.shape:
        return NotImplemented
    if any(type(each) is not int for each in shape):  # True equals 1, and torch takes neither that nor 1.0
        return NotImplemented
    return part(aten.native_layer_norm.default, torch.native_layer_norm, input, [*shape], weight, bias, eps)[0]


def _cross_entropy(
    part: Part, input: Any, target: Any, weight: Any, size_average: Any, ignore_index: Any, reduce: Any,
    reduction: Any, label_smoothing: Any,
) -> Any:  # fmt: skip
    if not (weight is size_average is reduce is None) or label_smoothing != 0 or type(ignore_index) is not int:
        return NotImplemented
    if not _alike(input) or input.ndim != 2 or type(target) not in TENSORS or not -(1 << 63) <= ignore_index < 1 << 63:
        return NotImplemented
    if type(reduction) is not str or reduction not in _REDUCTIONS:
        return NotImplemented
    if target.dtype is not torch.int64 or not target.is_cpu or target.shape != input.shape[:1]:
        return NotImplemented
    logs = part(aten._log_softmax.default, torch._log_softmax, input, 1, False)
    overload = aten.nll_loss_forward.default
    return part(overload, overload._op, logs, target, None, _REDUCTIONS[reduction], ignore_index)[0]


def _dropout(part: Part, input: Any, p: Any, training: Any, inplace: Any) -> Any:
    if not _alike(input) or type(p) is not float or not 0 < p < 1 or training is not True or inplace is not False:
        return NotImplemented
    mask = part(aten.empty_like.default, torch.empty_like, input)
    part.draw(aten.bernoulli_.float, mask, 1 - p)
    part.fill(aten.div_.Scalar, mask, 1 - p)
    return part(aten.mul.Tensor, torch.mul, input, mask)


def _lstm(
    part: Part, input: Any, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any, train: Any,
    bidirectional: Any, batch_first: Any,
) -> Any:  # fmt: skip
    if type(hx) is not tuple or len(hx) != 2 or type(params) is not list or type(num_layers) is not int:
        return NotImplemented
    if has_biases is not True or bidirectional is not False or len(params) != 4 * num_layers or not params:
        return NotImplemented
    if (dropout and train) or not _alike(input, *hx, *params) or input.dtype is not torch.float32 or input.ndim != 3:
        return NotImplemented
    if not (torch._C._get_mkldnn_enabled() and all(map(_contiguous, (*hx, *params)))):
        return NotImplemented
    hidden, size = params[1].shape[-1], input.shape[2]
    for i, each in enumerate(params):
        if each.shape != ((4 * hidden, hidden if i > 3 or i == 1 else size) if i % 4 < 2 else (4 * hidden,)):
            return NotImplemented
    if any(each.shape != (num_layers, input.shape[not batch_first], hidden) for each in hx):
        return NotImplemented
    x = part(aten.transpose.int, _transpose, input, 0, 1) if batch_first else input
    if not _contiguous(x):
        x = part.heard(aten.clone.default, torch.clone, x, memory_format=torch.contiguous_format)
    last: tuple[list[Any], list[Any]] = [], []
    for i in range(num_layers):
        before = [part(aten.select.int, _select, each, 0, i) for each in hx]
        given = (x, *params[4 * i : 4 * i + 4], *before, False, [], 2, hidden, num_layers, True, False, batch_first)
        x, *after, _ = part(aten.mkldnn_rnn_layer.default, torch.mkldnn_rnn_layer, *given, train)
        for state, of_layers in zip(after, last, strict=True):
            of_layers.append(state)
    states = [part.heard(aten.stack.default, torch.stack, of_layers) for of_layers in last]
    return (part(aten.transpose.int, _transpose, x, 0, 1) if batch_first else x, *states)


def _alike(*tensors: Any) -> bool:
    """Whether these are ordinary tensors of one dtype, one of the usual ones, on the CPU, with elements."""
    if type(tensors[0]) not in TENSORS:
        return False
    dtype = tensors[0].dtype
    if dtype not in _DTYPES:
        return False
    for x in tensors:
        if not (type(x) in TENSORS and x.dtype is dtype and x.is_cpu and x.layout is torch.strided and x.numel()):
            return False
    return True


#: By torch's function, how it is taken apart.
apart: dict[Any, Callable[..., Any]] = {
    torch._C._nn.linear: _linear,
    torch.conv1d: partial(_convolution, 1),
    torch.conv2d: partial(_convolution, 2),
    torch.conv3d: partial(_convolution, 3),
    Tensor.add_: _count,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.cross_entropy: _cross_entropy,
    F.dropout: _dropout,
    torch.lstm: _lstm,
}


# -- whether torch does the same -------------------------------------------------------------------------------


def _examples() -> dict[Any, list[tuple[Any, ...]]]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float32, device="cpu", requires_grad=True)

    def convolved(*one: int) -> tuple[Any, ...]:
        return ones(1, 1, *one), ones(1, 1, *one), ones(1), one, (0,) * len(one), one, 1

    def recurrent(layers: int, batch_first: bool) -> tuple[Any, ...]:
        hx = ones(layers, 2, 1), ones(layers, 2, 1)
        return (
            ones(2, 2, 1),
            hx,
            [ones(4, 1), ones(4, 1), ones(4), ones(4)] * layers,
            True,
            layers,
            0.0,
            True,
            False,
            batch_first,
        )

    integer = torch.zeros((), dtype=torch.int64, device="cpu")
    statistics = torch.zeros(3, device="cpu"), torch.ones(3, device="cpu")
    return {
        torch._C._nn.linear: [
            (ones(2, 3), ones(4, 3), ones(4)),
            (ones(2, 3), ones(4, 3)),
            (ones(2, 2, 3), ones(4, 3), ones(4)),
        ],
        torch.conv1d: [convolved(1)],
        torch.conv2d: [convolved(1, 1)],
        torch.conv3d: [convolved(1, 1, 1)],
        Tensor.add_: [(integer, 1)],
        F.batch_norm: [(ones(2, 3), *statistics, ones(3), ones(3), True, 0.1, 1e-5)],
        F.layer_norm: [(ones(2, 3), (3,), ones(3), ones(3), 1e-5)],
        F.cross_entropy: [
            (ones(2, 3), integer.expand(2), None, None, -100, None, reduction, 0.0) for reduction in _REDUCTIONS
        ],
        F.dropout: [(ones(2, 3), 0.5, True, False)],
        torch.lstm: [recurrent(2, True), recurrent(1, False)],
    }


class _Noting(Part):
    """Runs the parts, and notes their overloads."""

    __slots__ = ("overloads",)

    def __init__(self) -> None:
        self.overloads: list[OpOverload] = []

    def __call__(self, overload: OpOverload, function: Any, *args: Any) -> Any:
        self.overloads.append(overload)
        return function(*args)

    def heard(self, overload: OpOverload, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.overloads.append(overload)
        return function(*args, **kwargs)

    def write(self, overload: OpOverload, *args: Any) -> Any:
        return self(overload, overload, *args)

    draw = fill = write
    update = move = __call__


def are_made_so(overloads_of: Callable[..., list[OpOverload]]) -> dict[Any, Callable[..., Any]]:
    """Those of `apart` that torch takes apart as they are here; `overloads_of` tells what it runs for a call."""
    found = {}
    with torch.random.fork_rng(devices=()):  # one of them draws
        for function, calls in _examples().items():
            alike = True
            for args in calls:
                noting = _Noting()
                apart[function](noting, *args)
                overloads = [each for each in overloads_of(function, *args) if each is not aten.empty.memory_format]
                alike = alike and overloads == noting.overloads
            if alike:
                found[function] = apart[function]
    return found
