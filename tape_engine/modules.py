"""Scopes from modules: while a recording is open, each called ``nn.Module`` names the nodes inside it.

The outermost module called gives its class's name, those inside it the names under which it holds
them: ``Sequential``, ``Sequential/0``. Its parameters take their names from it as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch

__all__ = ["close_scope", "listen", "open_scope", "parameter_name", "path", "stop_listening"]


class _Now:
    """Where a thread is."""

    __slots__ = ("depth", "listening", "names", "outermost", "parameters", "path")

    def __init__(self) -> None:
        self.listening = 0
        self.path: tuple[str, ...] = ()  # of scopes, the user's own and those of modules
        self.depth = 0  # of module calls
        self.names: dict[int, str] = {}  # of the modules inside the outermost one called
        self.outermost: list[torch.nn.Module] = []  # those called whose parameters are not among the named ones yet
        self.parameters: dict[int, tuple[str, torch.Tensor]] = {}


class _Here(threading.local):
    def __init__(self) -> None:
        self.now = _Now()  # asked at every operation: one look into what is the thread's own


_here = _Here()
_lock = threading.Lock()
_listeners = 0
_codes: tuple[Any, Any] = None, None  # of ``Module._call_impl``: torch's own, and that while a recording is open
_unhear: Callable[[], None] = print
_backward_hook: Callable[[torch.nn.Module], None] = print
_aside: Callable[[], AbstractContextManager[None]] = nullcontext

#: Modules that ask whether a function mode is at work, and compute another way then (``has_torch_function``).
_ASKING = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)


def on_backward_hook(handler: Callable[[torch.nn.Module], None]) -> None:
    """The room of warnings says here what is said of a module with a hook for torch's own backward."""
    global _backward_hook
    _backward_hook = handler


def on_asking(aside: Callable[[], AbstractContextManager[None]]) -> None:
    """The recorder says here how to keep its function mode out of the way of modules that ask for one."""
    global _aside
    _aside = aside


def _in_scope(original: Any) -> Any:
    """``Module._call_impl``, which runs a module with its hooks, in a scope of its own."""

    def calling(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = _here.now
        if not now.listening:
            return original(self, *args, **kwargs)
        if not now.depth:
            now.names = _names_in(self)
            now.outermost.append(self)
        if self._backward_hooks or self._backward_pre_hooks:
            _backward_hook(self)
        outside = now.path
        now.depth += 1
        now.path = (*outside, now.names.get(id(self)) or type(self).__name__)
        try:
            if isinstance(self, _ASKING):
                with _aside():
                    return original(self, *args, **kwargs)
            return original(self, *args, **kwargs)
        finally:
            if now.depth:
                now.depth -= 1
            now.path = now.path[: len(outside)]

    return calling


def _code_in_scope(own: FunctionType) -> CodeType:
    """The code of a function that does what `own`, ``Module._call_impl``, does, in a scope."""

    def _call_impl(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calling: Any = "in scope"
        return calling(self, *args, **kwargs)

    calling = _in_scope(FunctionType(own.__code__, own.__globals__, own.__name__))
    constants = [calling if each == "in scope" else each for each in _call_impl.__code__.co_consts]
    return _call_impl.__code__.replace(co_consts=tuple(constants))


def _hear() -> None:
    """From now on modules run in scopes, until `_unhear` is called.

    Torch's own global hooks would do, but with any of them each call takes the long way round, some 20 µs of it. And
    a method that is set makes Python go through all classes of modules: so the function stays, and has another code.
    """
    global _codes, _unhear
    own: Any = torch.nn.Module._call_impl
    if type(own) is FunctionType and not (own.__closure__ or own.__defaults__ or own.__kwdefaults__):
        if own.__code__ is not _codes[0]:
            _codes = own.__code__, _code_in_scope(own)
        _unhear = partial(setattr, own, "__code__", _codes[0])
        own.__code__ = _codes[1]
    else:  # somebody has wrapped it
        _unhear = partial(setattr, torch.nn.Module, "_call_impl", own)
        torch.nn.Module._call_impl = _in_scope(own)  # type: ignore[method-assign]


def _names_in(outermost: torch.nn.Module) -> dict[int, str]:
    """The names of the modules inside one, by ``id``: as ``named_modules`` tells them, in fewer steps."""
    names: dict[int, str] = {}
    stack = [(outermost, "")]
    while stack:
        module, name = stack.pop()
        if id(module) not in names:
            names[id(module)] = name
            inside = module._modules
            if inside:
                before = name + "." if name else ""
                stack += [(each, before + own) for own, each in reversed(inside.items()) if each is not None]
    return names


def listen() -> int:
    """Begins to follow module calls on this thread; may be nested. Returns what `stop_listening` takes."""
    global _listeners
    with _lock:
        _listeners += 1
        if _listeners == 1:
            _hear()
    now = _here.now
    now.listening += 1
    return len(now.path)


def stop_listening(length: int) -> None:
    """Ends what `listen` began, with the scopes that an exception left open."""
    global _listeners
    now = _here.now
    now.listening -= 1
    now.path = now.path[:length]
    if not now.listening:
        now.depth = 0
        now.outermost.clear()
        now.parameters.clear()
    with _lock:
        _listeners -= 1
        if _listeners == 0:
            _unhear()


def open_scope(name: str) -> int:
    """Begins a scope of the user's; returns what `close_scope` takes."""
    now = _here.now
    now.path = (*now.path, name)
    return len(now.path) - 1


def close_scope(length: int) -> None:
    """Ends what `open_scope` began."""
    now = _here.now
    now.path = now.path[:length]


def path() -> tuple[str, ...]:
    """The scopes that are open, outermost first."""
    return _here.now.path


def parameter_name(tensor: torch.Tensor) -> str | None:
    """The name under which the outermost module called holds `tensor`."""
    now = _here.now
    for module in now.outermost:  # named when a name is first asked for: most steps ask for none
        now.parameters.update({id(p): (name, p) for name, p in module.named_parameters()})
        now.parameters.update({id(b): (name, b) for name, b in module.named_buffers()})
    now.outermost.clear()
    found = now.parameters.get(id(tensor))
    return found[0] if found is not None and found[1] is tensor else None
