"""Gradient rules of torch's operations: a file a topic, a small function an operation.

The grammar of a rule, on the smallest example that shows it all::

    @rule(aten.mm.default, samples=[sample(spec(3, 4), spec(4, 2))], formula="a @ b")
    def mm_grad(g, out, a, b):
        return g @ b.mH, a.mH @ g

- `rule` enters the function for an **ATen overload**: what torch runs once a call is taken apart
  (``a @ b`` of two matrices is ``aten.mm.default``; ``nn.Linear`` is ``aten.t`` and ``aten.addmm``).
  The rules name them by `common.aten`, for which another release of torch may have what this one lacks: a rule for
  that is left out.
- **g** is the gradient of the loss with respect to the output, in the output's shape. An operation
  of several outputs gets a tuple, with ``None`` for an output that the loss does not reach.
- **out** is the output; then come the operation's own arguments, with its defaults and
  keyword-only arguments as its schema has them.
- The rule returns **one gradient for each tensor argument**, in order, the tensors of a list each
  for itself; ``None`` for one that has none (an index, a mask). What stands for a Python number in a
  tensor's place (``x * 2``) is not looked at, and may be ``None`` too.
- It is **mathematics only**. The sweep sums contributions, sums over broadcast dimensions (where the
  output has the shape that broadcasting the arguments gives, or ``broadcasts=True`` says so), casts
  to the argument's dtype, and takes the real part where the argument is real.
- **Complex numbers** follow torch: the gradient of a real loss with respect to ``z = x + iy`` is
  ``dL/dx + i dL/dy``. So a holomorphic rule multiplies by the conjugate of the derivative.
- It is **built of torch operations that have rules themselves**, never writes to what it was given,
  and takes no decision by a tensor's contents: so it can be recorded for second derivatives, and
  replayed.
- **What it reads is kept** until the sweep. Asking ``x.shape`` keeps nothing; ``x * 2`` keeps ``x``.
  So prefer ``out`` where the formula can be told by it, and pass ``x.shape`` on, not ``x``.
- At a **kink** it gives what torch gives: relu 0 at 0, abs 0, maximum a half to each of two equals,
  amax an equal share, max over a dimension one index; a clamp at its bound what this release of torch gives.
- **Samples** are the calls with which it is tested: against `torch.autograd`, against finite
  differences, with strides, with the same tensor twice, and for second derivatives. Elements given
  outright (``spec(3, values=[-1.0, 0.0, 1.0])``) mark a kink, where finite differences do not count.

What has no gradient is declared: ``declare(aten.eq.Tensor)``. Zero is a gradient too: ``floor`` has
the rule that returns zeros, as in torch.
"""

from __future__ import annotations

from . import (
    activations,
    bounds,
    creation,
    decompositions,
    distances,
    elementary,
    fft,
    indexing,
    linear_algebra,
    losses,
    nn,
    normalization,
    pointwise,
    random,
    reductions,
    reflectors,
    resizing,
    sequences,
    shapes,
    strides,
)

__all__ = [
    "activations",
    "bounds",
    "creation",
    "decompositions",
    "distances",
    "elementary",
    "fft",
    "indexing",
    "linear_algebra",
    "losses",
    "nn",
    "normalization",
    "pointwise",
    "random",
    "reductions",
    "reflectors",
    "resizing",
    "sequences",
    "shapes",
    "strides",
]
