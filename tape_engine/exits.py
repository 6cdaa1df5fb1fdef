"""What torch does behind the dispatcher's back, heard while a recording is open.

A dispatch mode does not hear when values leave the tensors for Python or NumPy, and of a custom
``torch.autograd.Function`` it hears the body without the function's own backward. So while a block is open,
the few methods by which that happens are wrapped; the wrappers are taken off with the last block.

- ``Function.apply`` is recorded as one node, whose rule is the function's own ``backward``: by the recorder, which is
  asked at each call from the first recording on, for a recorded tensor may be given to one outside a block.
- ``detach_()`` cuts a gradient, which torch does without telling the dispatcher. ``detach()`` and
  ``.data`` it does tell, but autograd detaches as well, each output that it saves: only the user's is a cut.
- ``x.data = y`` gives a tensor other contents, ``torch.tensor(x)`` copies them without the gradient, and
  ``nn.Parameter(x)`` looks into them: none of these says so.
- ``copy.deepcopy`` and ``copy.copy`` of what was computed are a clone and a view; pickling it hands it out, and so does
  taking the numbers out of a list of tensors (``torch.tensor([a, b])``): they warn as ``numpy()`` does.
- Singular values alone are computed by another algorithm than with vectors, which torch takes where a mode listens.
- ``tolist()`` decides something in Python by the elements: it is a guard, like ``item()``.
- ``register_hook`` asks for a call at a gradient: it is torch's own backward that makes it, never a sweep, so it warns.
- ``one_hot`` asks for the least and the greatest class only to refuse them: no decision of the user's.
- ``apply_`` and ``map_`` write what a function of Python gives for each element: refused where a gradient would pass.
- A warning of torch's is shown at the line that called the recorder, which calls torch in its place.
- A thread that is started in a block is watched: of what it computes the block hears nothing, so it warns.
- Outside a block ``torch.asarray``, ``torch.tensor([a, b])`` and the like never ask the class of what they are
  given, so they are wrapped for good, from the first time on that a recorded tensor listens.
- ``x.set_(y)`` and writes to a storage give a tensor other contents: a program is refused then.
- A function of ``torch.compile`` runs as it was written (`compiler`): of what it compiles to, no mode hears the
  operations.
- ``numpy()``, ``__array__``, ``__dlpack__`` and ``data_ptr()`` hand the memory to code that nothing can follow:
  on a value through which a gradient could pass they warn, and the elements handed out are a guard as well. What
  rules read there is copied, as a write to that memory is heard by nobody.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch._C import DisableTorchFunction
from torch.jit import _builtins, _recursive, _script
from torch.nn.parameter import is_lazy
from torch.utils import _device

from . import compiler
from .aliases import expose
from .names import called_by_user
from .tape import bound, current_tape, rebind
from .warned import placed, refuse_by_python, warn_of_exit, warn_of_hook, warn_of_list

__all__ = [
    "by_constructor",
    "close_exits",
    "hear_functions",
    "more",
    "open_exits",
    "plain_apply",
    "reconstructed",
    "tensors_within",
]

Tensor = torch.Tensor

#: Methods that hand a tensor's memory, or its elements, to code that is not torch's.
LEAVING = ("numpy", "__array__", "__dlpack__", "data_ptr")

#: Functions that make tensors of what they are given, without asking its class.
UNASKED = ("asarray", "as_tensor", "tensor")

#: Methods by which a constructor of tensors asks for the numbers of what stands in a list.
NUMBERS = ("__float__", "__index__", "__complex__")

#: Methods that ask for a call at a gradient of torch's own.
HOOKS = ("register_hook", "register_post_accumulate_grad_hook")

#: Functions that ask for singular values or eigenvalues, and not for the vectors.
OF_VALUES = (
    *((torch.linalg, name) for name in ("svdvals", "eigvalsh", "cond", "matrix_norm", "norm")),
    (torch, "norm"),
    (torch, "nuclear_norm"),
    (Tensor, "norm"),
)

#: Methods that write to a tensor what a function of Python gives for each element, and tell nobody.
BY_PYTHON = ("apply_", "map_", "map2_")

_dlpack: Any = torch.utils.dlpack
_is_excluded: Any = torch._C._dispatch_tls_is_dispatch_key_excluded
_PYTHON = torch._C.DispatchKey.Python
_lock = threading.Lock()
_open = 0


class Wrapper(NamedTuple):
    """What stands in the place of a method or function while a block is open.

    Attributes:
        owner, name: where it stands.
        held: all that the owner itself has, by name.
        own: what the owner itself has there otherwise; ``None`` for what it inherits.
        original: the same, or what it inherits, where somebody might change that.
        made: the wrapper.
        make: makes it of the original.
    """

    owner: Any
    name: str
    held: Any
    own: Any
    original: Any
    made: Any
    make: Callable[[Any], Any]


_wrappers: list[Wrapper] = []  # made once of each original
wrapped: dict[Any, Any] = {}  # what each stands for: a function mode is given the wrapper, which has done its work
_heard: Callable[[], bool] = bool  # whether this thread is recording; the recorder says it
_guard: Callable[[Tensor, str], None] = print
_cut: Callable[[Tensor], None] = print
_detach: Callable[[Any, Tensor], Tensor] = print  # type: ignore[assignment]
_set: Callable[[Any, Tensor, Any], None] = print
_parameter: Callable[..., Any] = print
_quietly: Callable[[], AbstractContextManager[None]]
_unfollowed: Callable[[str], None] = print
_values_alone: Callable[[], AbstractContextManager[None]]
_deepcopy: Callable[[Any, Tensor, dict[int, Any]], Tensor]
_shallow: Callable[[Tensor], Tensor]
_function: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_watched: Callable[[threading.Thread, Callable[[], None]], Callable[[], None]]
_listens: Callable[[Any], bool] = bool  # whether plain operations on this are recorded outside a block
_asked: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_plain_apply: Any = None  # torch's own Function.apply, once the recorder is asked first


class _Telling(threading.local):
    told = False  # whether it is said that a list is read just now
    last: Any = ()  # the call that asked last, and how long the tape was then


_telling = _Telling()

#: Methods of a storage by which its contents change without an operation.
MOVING = ("resize_", "copy_", "fill_")

#: What else is wrapped while a block is open: its owner, its name, and what makes its wrapper of the original.
more: list[tuple[Any, str, Callable[[Any], Any]]] = []


def unheard(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What the recorder does by itself, of which a function mode of the user's hears nothing."""

    @functools.wraps(handler)
    def handling(*args: Any) -> Any:
        with DisableTorchFunction():
            return handler(*args)

    return handling


def on_exit(
    heard: Callable[[], bool],
    guard: Callable[[Tensor, str], None],
    cut: Callable[[Tensor], None],
    detach: Callable[[Any, Tensor], Tensor],
    set_data: Callable[[Any, Tensor, Any], None],
    parameter: Callable[..., Any],
    quietly: Callable[[], AbstractContextManager[None]],
    unfollowed: Callable[[str], None],
    values_alone: Callable[[], AbstractContextManager[None]],
) -> None:
    """The recorder says here whether it listens, how it records what is heard here, and how it hears nothing."""
    global _heard, _guard, _cut, _detach, _set, _parameter, _quietly, _unfollowed, _values_alone
    _heard, _guard, _cut, _detach = heard, unheard(guard), unheard(cut), detach
    _set, _parameter, _quietly, _unfollowed, _values_alone = set_data, parameter, quietly, unfollowed, values_alone


def on_copy(deepcopy: Callable[[Any, Tensor, dict[int, Any]], Tensor], shallow: Callable[[Tensor], Tensor]) -> None:
    """The recorder says here how it records what the module `copy` does."""
    global _deepcopy, _shallow
    _deepcopy, _shallow = deepcopy, shallow


def on_function(handler: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """The recorder says here what applying a custom function does."""
    global _function
    _function = handler


def on_plain(listens: Callable[[Any], bool], asked: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """The recorder says here whether it listens to a tensor outside a block, and what a function of such a one does."""
    global _listens, _asked
    _listens, _asked = listens, asked


def on_thread(watched: Callable[[threading.Thread, Callable[[], None]], Callable[[], None]]) -> None:
    """The recorder says here how it watches a thread that is started in a block."""
    global _watched
    _watched = watched


def open_exits() -> None:
    """Wraps the methods; the wrappers do nothing on threads that do not record."""
    global _open
    hear_functions()
    with _lock:
        _open += 1
        if _open == 1:
            compiler.hold()
            if not _wrappers:
                _wrappers.extend([_wrapper(*each) for each in (*_wrapped(), *more)])
            # Once a block, and the memory of all this is cold by then: nothing is looked up that need not be.
            for i, (owner, name, held, own, original, made, make) in enumerate(_wrappers):
                if held.get(name) is not own or (original is not own and getattr(owner, name, None) is not original):
                    _wrappers[i] = _wrapper(owner, name, make)  # somebody put another one there
                    made = _wrappers[i].made
                setattr(owner, name, made)


def close_exits() -> None:
    """Takes the wrappers off with the last recording."""
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            compiler.give_up()
            for owner, name, _, own, _, _, _ in _wrappers:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)


def _wrapper(owner: Any, name: str, make: Callable[[Any], Any]) -> Wrapper:
    original, held = getattr(owner, name, None), owner.__dict__
    made = _known_as(owner, name, original, make(original))
    wrapped.update(_called(made, original))
    # What Tensor inherits nobody can change, so that what it has of its own tells whether it is as it was.
    known = held.get(name) if owner is Tensor else original
    return Wrapper(owner, name, held, held.get(name), known, made, make)


def _called(made: Any, original: Any) -> list[tuple[Any, Any]]:
    """What torch calls of a wrapper, each with what it stands for."""
    if isinstance(made, property):
        return [(made.__get__, original.__get__), (made.__set__, original.__set__)]
    return [(made.__func__ if isinstance(made, staticmethod) else made, original)]


def _known_as(owner: Any, name: str, original: Any, made: Any) -> Any:
    """A wrapper under the name of what it wraps: pickle looks there for it, ``torch.jit`` has a table of functions."""
    function = made.__func__ if isinstance(made, staticmethod) else made
    if isinstance(function, FunctionType):
        in_module = isinstance(owner, ModuleType)
        function.__name__, function.__doc__ = name, original.__doc__
        function.__qualname__ = name if in_module else f"{owner.__qualname__}.{name}"
        function.__module__ = owner.__name__ if in_module else owner.__module__
        operator = _builtins._find_builtin(original) if in_module else None  # type: ignore[no-untyped-call]
        if operator is not None:
            _builtins._register_builtin(function, operator)
    return made


@functools.cache
def _wrapped() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """What is wrapped: its owner, its name, and what makes its wrapper of the original."""
    return [
        *((Tensor, name, functools.partial(_leaving, name)) for name in LEAVING),
        (Tensor, "tolist", _tolist),
        (Tensor, "detach", _detaching),
        (Tensor, "data", lambda original: property(_getting(original.__get__), _setting(original.__set__))),
        (Tensor, "_make_subclass", lambda original: staticmethod(_subclassing(original))),
        (torch, "tensor", functools.partial(_copying, "torch.tensor", 0)),
        (Tensor, "new_tensor", functools.partial(_copying, ".new_tensor", 1)),
        *((torch, name, functools.partial(_gathering, f"torch.{name}")) for name in ("as_tensor", "asarray")),
        (Tensor, "__deepcopy__", _deepcopying),
        (Tensor, "__copy__", lambda original: _shallowly),
        (Tensor, "__reduce_ex__", _reducing),
        (Tensor, "set_", functools.partial(_moving, "x.set_(...)")),
        *((Tensor, name, functools.partial(_by_python, name)) for name in BY_PYTHON),
        *((Tensor, name, _number) for name in NUMBERS),
        (_recursive, "try_compile_fn", _scripting),
        (_script, "_get_overloads", _scripting),
        (threading.Thread, "start", _starting),
        (warnings, "_showwarnmsg", placed),
        *(
            (torch.UntypedStorage, name, functools.partial(_moving, f"x.untyped_storage().{name}(...)"))
            for name in MOVING
        ),
        *((owner, name, _of_values) for owner, name in OF_VALUES),
        (Tensor, "detach_", _detach_),
        *((Tensor, name, functools.partial(_hooking, name)) for name in HOOKS),
        (torch.nn.functional, "one_hot", _one_hot),
    ]


def _hooking(name: str, original: Any) -> Any:
    def register(self: Tensor, hook: Any) -> Any:
        if _heard() and called_by_user():
            warn_of_hook(self, f".{name}() asks for", stacklevel=3)
        return original(self, hook)

    return register


def _leaving(name: str, original: Any) -> Any:
    def wrapper(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _heard() and (called_by_user() or name == "__dlpack__"):  # torch.from_dlpack calls that
            with DisableTorchFunction():
                warn_of_exit(self, name)
                expose(self)
            if name != "data_ptr":  # an address, of which a replay has another
                _guard(self, "elements")
        return original(self, *args, **kwargs)

    return wrapper


def _tolist(original: Any) -> Any:
    def tolist(self: Tensor) -> Any:
        result = original(self)
        if _heard() and called_by_user():
            _guard(self, "tolist")
        return result

    return tolist


def _detaching(original: Any) -> Any:
    def detach(self: Tensor) -> Tensor:
        return _detach(original, self) if _heard() else original(self)

    return detach


def _getting(original: Any) -> Any:
    def data(self: Tensor) -> Tensor:
        if not _heard():
            return original(self)  # type: ignore[no-any-return]
        if is_lazy(self):  # nothing to follow: it has no contents yet, nor a shape
            with _quietly():
                return original(self)  # type: ignore[no-any-return]
        made = _detach(original, self)
        rebind(made)  # torch counts the writes to it anew
        return made

    return data


def _setting(original: Any) -> Any:
    def set_data(self: Tensor, other: Any) -> None:
        if _heard() and isinstance(other, Tensor) and not is_lazy(self):
            _set(original, self, other)
        else:
            original(self, other)

    return set_data


def _subclassing(original: Any) -> Any:
    # Of no signature, as torch's own: torch._dynamo compares it when it is first imported, inside a block perhaps.
    def make_subclass(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 or kwargs or not _heard():
            return original(*args, **kwargs)
        return _parameter(original, *args)

    return make_subclass


def _copying(title: str, place: int, original: Any) -> Any:
    """A function that copies its argument at `place`, where that is a tensor, as a constant."""

    def copying(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= place or not isinstance(args[place], (Tensor, list, tuple)) or not _heard():
            return original(*args, **kwargs)
        if isinstance(args[place], Tensor):
            return _detach(lambda given: original(*args[:place], given, *args[place + 1 :], **kwargs), args[place])
        return _listed(title, args[place], original, args, kwargs)

    return copying


def _gathering(title: str, original: Any) -> Any:
    """A function that takes the numbers out of a list of tensors."""

    def gathering(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (list, tuple)) and _heard():
            return _listed(title, args[0], original, args, kwargs)
        return original(*args, **kwargs)

    return gathering


def _listed(title: str, listed: Any, original: Any, args: Any, kwargs: Any) -> Any:
    """A call of `original`, which takes the numbers out of the tensors in a list."""
    _taken_out(title, listed)
    return _told(original, args, kwargs)


def _told(original: Any, args: Any, kwargs: Any) -> Any:
    _telling.told = True
    try:
        return original(*args, **kwargs)
    finally:
        _telling.told = False


def by_constructor() -> bool:
    """Whether torch itself asks for a number of a tensor, unheard by every mode, for the first time in this call."""
    if not _is_excluded(_PYTHON) or _telling.told:
        return False
    frame = sys._getframe(2)
    before, _telling.last = _telling.last, (frame.f_code, frame.f_lasti, current_tape().length)
    return bool(before != _telling.last)


def _number(original: Any) -> Any:
    def number(self: Tensor) -> Any:
        if _is_excluded(_PYTHON) and not _telling.told and _heard():
            first = by_constructor()
            with DisableTorchFunction():
                _guard(self, "elements")
                if first:
                    warn_of_list("a constructor", [self], stacklevel=3)
            _telling.last = (*_telling.last[:2], current_tape().length)
        return original(self)

    return number


def _scripting(original: Any) -> Any:
    """What ``torch.jit.script`` looks a function up by: of a wrapper, what it wraps."""

    def scripting(fn: Any, *rest: Any) -> Any:
        return original(wrapped.get(fn, fn) if isinstance(fn, FunctionType) else fn, *rest)

    return scripting


def _taken_out(title: str, listed: Any) -> None:
    """Numbers are taken out of the tensors in a list: torch tells nobody, and no gradient passes."""
    tensors = list(tensors_within(listed))
    for tensor in tensors:
        _guard(tensor, "elements")
    warn_of_list(title, tensors)


def tensors_within(listed: Any) -> Iterator[Tensor]:
    """The tensors in a list, also in lists inside it, in order."""
    for each in listed:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from tensors_within(each)


def _deepcopying(original: Any) -> Any:
    def __deepcopy__(self: Tensor, memo: dict[int, Any]) -> Tensor:
        return _deepcopy(original, self, memo) if _heard() else original(self, memo)

    return __deepcopy__


def reconstructed(tensor: Any) -> Any:
    """What ``copy.copy`` makes of a tensor by itself."""
    return copy._reconstruct(tensor, None, *tensor.__reduce_ex__(4))  # type: ignore[attr-defined]


def _shallowly(self: Tensor) -> Tensor:
    if _heard():
        return _shallow(self)
    made: Tensor = reconstructed(self)
    return made


def _reducing(original: Any) -> Any:
    def __reduce_ex__(self: Tensor, protocol: Any) -> Any:
        if _heard():
            warn_of_exit(self, "__reduce_ex__")
            if bound(self) is not None:
                _guard(self, "elements")
        return original(self, protocol)

    return __reduce_ex__


def _capsuling(original: Any) -> Any:
    def to_dlpack(tensor: Tensor) -> Any:
        if _heard() or _listens(tensor):
            warn_of_exit(tensor, "to_dlpack")
            with _quietly():
                expose(tensor)
            if _heard():
                _guard(tensor, "elements")
        return original(tensor)

    return to_dlpack


def _of_values(original: Any) -> Any:
    def of_values(*args: Any, **kwargs: Any) -> Any:
        if not _heard():
            return original(*args, **kwargs)
        with _values_alone():
            return original(*args, **kwargs)

    return of_values


def _moving(title: str, original: Any) -> Any:
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _heard() and called_by_user():
            _unfollowed(title)
        return original(self, *args, **kwargs)

    return move


def _by_python(name: str, original: Any) -> Any:
    def by_python(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _heard():
            refuse_by_python(self, name)
            expose(self)  # a rule may read what lies there, and torch counts no such write
            _unfollowed(f"x.{name}(...)")
        return original(self, *args, **kwargs)

    return by_python


def _detach_(original: Any) -> Any:
    def detach_(self: Tensor) -> Tensor:
        result: Tensor = original(self)
        if _heard():
            _cut(self)
        return result

    return detach_


def _starting(original: Any) -> Any:
    def start(self: threading.Thread) -> None:
        if _heard():
            self.run = _watched(self, self.run)  # type: ignore[method-assign]
        original(self)

    return start


def _one_hot(original: Any) -> Any:
    def one_hot(*args: Any, **kwargs: Any) -> Any:
        count = args[1] if len(args) > 1 else kwargs.get("num_classes")
        if not _heard() or not isinstance(count, int) or count < 0:
            return original(*args, **kwargs)  # without a count the greatest class is the result's shape
        with _quietly():
            original(*args, **kwargs)  # it raises what torch raises
        classes = args[0] if args else next(each for each in kwargs.values() if isinstance(each, Tensor))
        return classes.new_zeros((*classes.shape, count)).scatter(-1, classes.unsqueeze(-1), 1)

    return one_hot


# -- a function's own backward ---------------------------------------------------------------------------


def hear_functions() -> None:
    """From now on the recorder is asked at each ``Function.apply``: outside a block recorded tensors listen."""
    global _plain_apply
    compiler.follow()
    if _plain_apply is not None:
        return
    with _lock:
        if _plain_apply is None:
            _plain_apply = torch.autograd.Function.__dict__["apply"]
            _device._device_constructors()  # torch remembers its functions that make tensors: not the wrappers of them
            torch.autograd.Function.apply = classmethod(_applying())  # type: ignore[method-assign, assignment]
            for name in UNASKED:
                original = getattr(torch, name)
                setattr(torch, name, _known_as(torch, name, original, _asking(f"torch.{name}", original)))
            Tensor.set_ = _setting_memory(Tensor.set_)  # type: ignore[method-assign]
            Tensor.as_subclass = _recasting(Tensor.as_subclass)  # type: ignore[method-assign]
            _dlpack.to_dlpack = _capsuling(_dlpack.to_dlpack)


def _asking(title: str, original: Any) -> Any:
    """A function of which torch does not ask the classes of its arguments, so that outside a block it is unheard."""

    @functools.wraps(original)
    def asking(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            while isinstance(first, (list, tuple)) and first:
                first = first[0]
            if _listens(first):
                warn_of_list(title, tensors_within(args[0]))
                return _told(original, args, kwargs)
        elif title != "torch.tensor" and _listens(first):  # that copies, without the gradient
            return _asked(original, args, kwargs)
        return original(*args, **kwargs)

    return asking


def _setting_memory(original: Any) -> Any:
    @functools.wraps(original)
    def set_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and (_listens(args[0]) or _listens(self)):
            return _asked(original, (self, *args), kwargs)
        return original(self, *args, **kwargs)

    return set_


def _recasting(original: Any) -> Any:
    @functools.wraps(original)
    def as_subclass(self: Tensor, cls: Any) -> Any:
        return _asked(original, (self, cls), {}) if _listens(self) else original(self, cls)

    return as_subclass


def _applying() -> Any:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:  # by this name torch.compile knows it
        return _function(cls, args, kwargs)

    return apply


def plain_apply(cls: Any) -> Any:
    """Torch's own ``apply`` of a custom function."""
    return (_plain_apply or torch.autograd.Function.__dict__["apply"]).__get__(None, cls)
