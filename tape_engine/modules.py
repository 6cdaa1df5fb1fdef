"""Scopes from modules: while a recording is open, each called ``nn.Module`` names the nodes inside it.

The outermost module called gives its class's name, those inside it the names under which it holds
them: ``Sequential``, ``Sequential/0``. Its parameters take their names from it as well.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .errors import TapeWarning

__all__ = ["close_scope", "listen", "open_scope", "parameter_name", "path", "stop_listening"]


class _Here(threading.local):
    def __init__(self) -> None:
        self.listening = 0
        self.path: list[str] = []  # of scopes, the user's own and those of modules
        self.depth = 0  # of module calls
        self.names: dict[int, str] = {}  # of the modules inside the outermost one called
        self.outermost: list[torch.nn.Module] = []  # those called whose parameters are not among the named ones yet
        self.parameters: dict[int, tuple[str, torch.Tensor]] = {}


_here = _Here()
_lock = threading.Lock()
_listeners = 0
_hooks: list[Any] = []


def _enter(module: torch.nn.Module, args: Any) -> None:
    if not _here.listening:
        return
    if not _here.depth:
        _here.names = {id(inside): name for name, inside in module.named_modules()}
        _here.outermost.append(module)
    if module._backward_hooks or module._backward_pre_hooks:
        warnings.warn(
            f"{type(module).__name__} has a backward hook for torch's own backward: te.backward calls no hook.",
            TapeWarning,
            stacklevel=3,
        )
    _here.depth += 1
    _here.path.append(_here.names.get(id(module)) or type(module).__name__)


def _leave(module: torch.nn.Module, args: Any, result: Any) -> None:
    if _here.listening and _here.depth:
        _here.depth -= 1
        _here.path.pop()


def listen() -> int:
    """Begins to follow module calls on this thread; may be nested. Returns what `stop_listening` takes."""
    global _listeners
    with _lock:
        _listeners += 1
        if _listeners == 1:
            _hooks.append(register_module_forward_pre_hook(_enter))
            _hooks.append(register_module_forward_hook(_leave, always_call=True))
    _here.listening += 1
    return len(_here.path)


def stop_listening(length: int) -> None:
    """Ends what `listen` began, with the scopes that an exception left open."""
    global _listeners
    _here.listening -= 1
    del _here.path[length:]
    if not _here.listening:
        _here.depth = 0
        _here.outermost.clear()
        _here.parameters.clear()
    with _lock:
        _listeners -= 1
        if _listeners == 0:
            while _hooks:
                _hooks.pop().remove()


def open_scope(name: str) -> int:
    """Begins a scope of the user's; returns what `close_scope` takes."""
    _here.path.append(name)
    return len(_here.path) - 1


def close_scope(length: int) -> None:
    """Ends what `open_scope` began."""
    del _here.path[length:]


def path() -> tuple[str, ...]:
    """The scopes that are open, outermost first."""
    return tuple(_here.path) if _here.path else ()


def parameter_name(tensor: torch.Tensor) -> str | None:
    """The name under which the outermost module called holds `tensor`."""
    for module in _here.outermost:  # named when a name is first asked for: most steps ask for none
        _here.parameters.update({id(p): (name, p) for name, p in module.named_parameters()})
        _here.parameters.update({id(b): (name, b) for name, b in module.named_buffers()})
    _here.outermost.clear()
    found = _here.parameters.get(id(tensor))
    return found[0] if found is not None and found[1] is tensor else None
