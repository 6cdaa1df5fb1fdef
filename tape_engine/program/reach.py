"""What the result of a function depends on besides the elements of tensors: its arguments and all it can reach.

A replay is right as long as that is as it was recorded: Python values, which tensors a closure, a module or an object
holds, training flags, torch's modes. It is written down as a flat list of facts, which serves as a key. Tensors among
the arguments are inputs of the replay, of which the facts are shape, dtype and device; every other tensor is live, and
the fact is which one it is.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Facts", "difference", "facts_of", "told"]

Tensor = torch.Tensor

#: Values that are facts themselves.
PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)

#: Whose code is taken as given: it does not change while a program runs.
GIVEN = {"torch", "tape_engine", "numpy", *sys.stdlib_module_names}

#: The attributes by which the engine's own objects (named operations, replayable functions) hold the user's code.
FUNCTIONS = ("forward", "grad", "_function")

SMALL = 65_536  # bytes of an array of NumPy up to which its elements are the fact
DEEPEST = 12  # how far into objects within objects is looked
MOST = 100_000  # how many facts a call may have: what lies beyond is told by its identity alone


class Facts:
    """The facts of one call.

    Attributes:
        key: the facts, in order.
        names: how each is called; kept where asked for.
        inputs: the tensors among the arguments, each once.
        reached: the other things that a fact tells by their identity.
    """

    def __init__(self, named: bool = False) -> None:
        self.key: list[Any] = []
        self.names: list[str] | None = [] if named else None
        self.inputs: list[Tensor] = []
        self.reached: list[Any] = []
        self._places: dict[int, int] = {}  # of inputs
        self._live: dict[int, Tensor] = {}
        self._seen: dict[int, Any] = {}

    def put(self, name: str, fact: Any) -> None:
        """Notes one fact."""
        self.key.append(fact)
        if self.names is not None:
            self.names.append(name)

    # -- arguments ---------------------------------------------------------------------------------------------

    def argument(self, name: str, given: Any) -> None:
        """An argument: its tensors are inputs, also inside tuples, lists and dictionaries."""
        if isinstance(given, Tensor):
            place = self._places.get(id(given))
            if place is None:
                place = self._places[id(given)] = len(self.inputs)
                self.inputs.append(given)
            spec = (tuple(given.shape), given.dtype, given.device, given.layout, given.requires_grad)
            self.put(name, ("input", place, *spec))
        elif isinstance(given, (tuple, list)):
            self.put(f"the length of {name}", (type(given), len(given)))
            for i, each in enumerate(given):
                self.argument(f"{name}[{i}]", each)
        elif type(given) is dict:
            self.put(f"the keys of {name}", tuple(given))
            for key, each in given.items():
                self.argument(f"{name}[{key!r}]", each)
        else:
            self.thing(name, given, 0)

    def also_live(self) -> None:
        """Which inputs are tensors that the function reaches by itself: what it does with one is one thing then."""
        both = [(place, key) for key, place in self._places.items() if key in self._live]
        self.put("which argument is also a parameter", tuple(both))

    # -- all else ----------------------------------------------------------------------------------------------

    def thing(self, name: str, it: Any, depth: int) -> None:
        """Anything that the function can reach."""
        kind = type(it)
        if kind is float or kind is complex:
            self.put(name, (kind, repr(it)))  # of NaN as well, and of -0.0
        elif isinstance(it, PLAIN):
            self.put(name, (kind, it))
        elif isinstance(it, Tensor):
            self._live[id(it)] = it
            self.by_identity(name, it, (it.shape, it.dtype, it.device, it.requires_grad))
        elif id(it) in self._seen:
            self.put(name, ("again", self._seen[id(it)][0]))
        elif depth > DEEPEST or len(self.key) > MOST:
            self.by_identity(name, it)
        else:
            self._seen[id(it)] = (len(self.key), it)
            self.inside(name, it, kind, depth + 1)

    def by_identity(self, name: str, it: Any, *more: Any) -> None:
        """A fact that tells which thing it is."""
        self.reached.append(it)
        self.put(name, (id(it), *more))

    def inside(self, name: str, it: Any, kind: type, depth: int) -> None:
        """What a thing holds."""
        if kind is tuple or kind is list:
            self.put(f"the length of {name}", (kind, len(it)))
            for i, each in enumerate(it):
                self.thing(f"{name}[{i}]", each, depth)
        elif isinstance(it, dict):
            self.put(f"the keys of {name}", tuple([key if isinstance(key, PLAIN) else id(key) for key in it]))
            for key, each in list(it.items()):
                self.thing(f"{name}[{key!r}]" if self.names is not None else "", each, depth)
        elif kind is types.FunctionType:
            self.by_identity(name, it.__code__)
            self.function(name, it, depth)
        elif kind is types.MethodType:
            self.thing(name, it.__func__, depth)
            self.thing(f"{name}.__self__", it.__self__, depth)
        elif isinstance(it, torch.nn.Module):
            self.by_identity(name, it)
            for key, each in list(vars(it).items()):
                if key in ("_parameters", "_buffers", "_modules"):
                    for inner, held in list(each.items()):
                        self.thing(f"{name}.{inner}", held, depth - 1)  # however deep modules are nested
                elif each is not None and not (isinstance(each, (dict, set, list)) and not each):
                    self.thing(f"{name}.{key}", each, depth)
        elif kind is set or kind is frozenset:
            self.put(name, (kind, frozenset([each if isinstance(each, PLAIN) else id(each) for each in it])))
        elif kind.__module__ == "numpy" and hasattr(it, "tobytes"):
            told = it.tobytes() if it.nbytes <= SMALL else id(it)
            self.put(name, (str(it.dtype), it.shape, told))
        else:
            self.by_identity(name, it)
            if not isinstance(it, (type, types.ModuleType)):
                self.attributes(name, it, kind, depth)

    def attributes(self, name: str, it: Any, kind: type, depth: int) -> None:
        """The attributes of an object: those of the instance."""
        own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        for key, each in list(getattr(it, "__dict__", {}).items()):
            if not own or key in FUNCTIONS:
                self.thing(f"{name}.{key}", each, depth)
        for owner in kind.__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for key in (slots,) if isinstance(slots, str) else slots:
                if not key.startswith("__") and hasattr(it, key):
                    self.thing(f"{name}.{key}", getattr(it, key), depth)

    def function(self, name: str, it: types.FunctionType, depth: int) -> None:
        """What a function reads besides its arguments: closure, defaults, globals that its code names."""
        if _given(it.__module__):
            return
        for title, cell in zip(it.__code__.co_freevars, it.__closure__ or (), strict=False):
            try:
                held = cell.cell_contents
            except ValueError:  # not yet filled
                continue
            self.thing(title, held, depth)
        for i, each in enumerate(it.__defaults__ or ()):
            self.thing(f"default {i} of {name}", each, depth)
        for title, each in (it.__kwdefaults__ or {}).items():
            self.thing(f"default of {title}", each, depth)
        for title in _names(it.__code__):
            if title not in it.__globals__:
                continue
            held = it.__globals__[title]
            if not isinstance(held, types.ModuleType):
                self.thing(title, held, depth)
            elif not _given(held.__name__):
                for inner in _names(it.__code__):
                    if inner in vars(held):
                        self.thing(f"{title}.{inner}", vars(held)[inner], depth)


_names_of: dict[types.CodeType, tuple[str, ...]] = {}


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a code object, and those inside it, look up: globals, and attributes among them."""
    found = _names_of.get(code)
    if found is None:
        inner = (name for each in code.co_consts if isinstance(each, types.CodeType) for name in _names(each))
        found = tuple(dict.fromkeys([*code.co_names, *inner]))
        if len(_names_of) > 10_000:
            _names_of.clear()
        _names_of[code] = found
    return found


def _given(module: str | None) -> bool:
    return (module or "").partition(".")[0] in GIVEN and module != "__main__"


def _modes() -> Iterator[tuple[str, Any]]:
    """Torch's switches, which decide what an operation does."""
    yield "the grad mode", torch.is_grad_enabled()
    yield "the inference mode", torch.is_inference_mode_enabled()
    yield "the default dtype", torch.get_default_dtype()
    yield "the default device", torch.get_default_device() if torch._C._len_torch_function_stack() else None
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        yield f"autocast on {device}", (enabled, torch.get_autocast_dtype(device) if enabled else None)


def facts_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, named: bool) -> Facts:
    """The facts of the call ``function(*args, **kwargs)``; `named` for messages about them."""
    facts = Facts(named)
    for name, mode in _modes():
        facts.put(name, mode)
    code = getattr(function, "__code__", None)
    titles: tuple[str, ...] = () if code is None else code.co_varnames[: code.co_argcount]
    facts.put("the number of arguments", len(args))
    for i, given in enumerate(args):
        facts.argument(titles[i] if i < len(titles) else f"argument {i}", given)
    facts.put("the keyword arguments", tuple(kwargs))
    for name, given in kwargs.items():
        facts.argument(name, given)
    facts.thing(getattr(function, "__name__", type(function).__name__), function, 0)
    facts.also_live()
    return facts


# -- facts in words ----------------------------------------------------------------------------------------------


def told(facts: Facts) -> Facts:
    """Facts as they are kept for a later message: without the things themselves."""
    facts_only = Facts()
    facts_only.key, facts_only.names = facts.key, facts.names
    return facts_only


def difference(before: Facts, now: Facts) -> str:
    """What differs between two calls, in words."""
    old = dict(zip(before.names or (), before.key, strict=True))
    new = dict(zip(now.names or (), now.key, strict=True))
    for name, fact in new.items():
        if name not in old:
            return f"{name}, which was not there before."
        if old[name] != fact:
            return f"{name}: {_said(old[name])} before, {_said(fact)} now."
    return "what it reaches: something is there no more."


def _said(fact: Any) -> str:
    """A fact in words."""
    if isinstance(fact, tuple) and fact and fact[0] == "input":
        _, _, shape, dtype, device, _, requires_grad = fact
        more = [str(device)] * (device.type != "cpu") + ["requires_grad"] * requires_grad
        return "  ".join([f"a tensor {shape}", str(dtype).removeprefix("torch."), *more])
    if isinstance(fact, tuple) and len(fact) == 2 and isinstance(fact[0], type):
        return fact[1] if fact[0] in (float, complex) else repr(fact[1])
    if (
        isinstance(fact, tuple)
        and fact
        and isinstance(fact[0], int)
        and not isinstance(fact[0], bool)
        and fact[0] > 1 << 20
    ):
        return f"one object (at {fact[0]:#x})"
    return repr(fact)
