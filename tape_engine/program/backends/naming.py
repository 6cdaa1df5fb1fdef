"""How a writer of replay functions calls things: identifiers that are the user's own words, arguments as text."""

from __future__ import annotations

import re
from typing import Any

import torch

from ...tape import Node, Value

__all__ = ["Names"]


class Names:
    """The part of a writer that names things.

    Attributes:
        space: what the names stand for that every copy of the function shares.
        used: how often each name was asked for.
        known: the names of what every copy of the function shares.
    """

    space: dict[str, Any]
    used: dict[str, int]
    known: dict[tuple[str, int], str]

    def name(self, value: Value, fallback: str = "v") -> str:
        """The name of a value in the code."""
        raise NotImplementedError

    def unused(self, wanted: str) -> str:
        """An identifier that nothing else bears: `wanted`, or `wanted` with a number."""
        wanted = re.sub(r"\W", "_", wanted)
        wanted = wanted if wanted and not wanted[0].isdigit() else f"p_{wanted}"
        wanted = wanted if wanted.isidentifier() else re.sub(r"\W", "_", wanted, flags=re.ASCII)
        found = wanted
        while found in self.used:
            self.used[wanted] = count = self.used.get(wanted, 0) + 1
            found = f"{wanted}_{count}"
        self.used[found] = 1
        return found

    def shared(self, wanted: str, thing: Any) -> str:
        """A name for something that every copy of the function shares."""
        name = self.known.get((wanted, id(thing)))
        if name is None:
            name = self.known[wanted, id(thing)] = self.unused(wanted)
            self.space[name] = thing  # which keeps it alive, so that its id stays its own
        return name

    def arguments(self, node: Node, first: int = 0, more: tuple[Any, ...] = ()) -> str:
        """The text of a node's arguments, from the one at `first` on."""
        found = [self.argument(each) for each in (*node.args[first:], *more)]
        return ", ".join([*found, *(f"{name}={self.argument(each)}" for name, each in node.kwargs.items())])

    def argument(self, argument: Any) -> str:
        """The text of an argument."""
        if isinstance(argument, Value):
            return self.name(argument)
        if type(argument) in (list, tuple):
            inside = ", ".join(self.argument(each) for each in argument)
            return f"[{inside}]" if isinstance(argument, list) else f"({inside}{',' if len(argument) == 1 else ''})"
        if type(argument) in (int, bool, str) or argument is None:
            return repr(argument)
        if type(argument) is float and argument == argument and abs(argument) != float("inf"):
            return repr(argument)
        if isinstance(argument, (torch.dtype, torch.layout, torch.memory_format)):
            return str(argument) if str(argument).startswith("torch.") else self.shared("param", argument)
        return self.shared("param", argument)
