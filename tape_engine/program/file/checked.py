"""Reading what cannot be trusted: each part of a header is what it must be, or its place in the file is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from ...errors import LoadError, message

__all__ = ["LARGEST", "Place", "boolean", "integer", "listed", "record", "refuse", "spelled", "text"]

#: Where in the header something stands: ``("nodes", 3, "args", 0)``.
Place = tuple[str | int, ...]

LARGEST = (1 << 63) - 1  # what torch can count to
LONGEST = 4096  # characters of a name or a line


def spelled(place: Place) -> str:
    """A place as messages write it: ``nodes[3].args[0]``."""
    found = ""
    for part in place:
        found += f"[{part}]" if isinstance(part, int) else f".{part}" if found else part
    return found or "the header"


def refuse(place: Place, what: str, fix: str | None = None) -> NoReturn:
    """Raises the error that names a place of the file, and what is wrong there."""
    raise LoadError(message(f"{spelled(place)}: {what}", fix=fix))


def shown(thing: Any) -> str:
    """What stands in the file, in a few characters."""
    if isinstance(thing, (dict, list)):
        return f"{'an object' if isinstance(thing, dict) else 'a list'} of {len(thing)}"
    if isinstance(thing, int) and thing.bit_length() > 128:
        return f"a number of {thing.bit_length()} bits"
    said = ascii(thing[:40] if isinstance(thing, str) else thing)
    return said if len(said) <= 60 else f"{said[:60]}…"


def integer(thing: Any, place: Place, low: int = 0, high: int = LARGEST) -> int:
    """A whole number from `low` to `high`."""
    if type(thing) is not int:
        refuse(place, f"a whole number is wanted, not {shown(thing)}.")
    if not low <= thing <= high:
        refuse(place, f"{shown(thing)} is not between {low} and {high}.")
    return thing


def boolean(thing: Any, place: Place) -> bool:
    """True or false."""
    if type(thing) is not bool:
        refuse(place, f"true or false is wanted, not {shown(thing)}.")
    return thing


def text(thing: Any, place: Place, *, empty: bool = False) -> str:
    """A string of printable characters, of a length that can be shown."""
    if type(thing) is not str:
        refuse(place, f"a string is wanted, not {shown(thing)}.")
    if len(thing) > LONGEST:
        refuse(place, f"a string of {len(thing)} characters, of which {LONGEST} are allowed.")
    if not thing.isprintable():
        refuse(place, f"the string {shown(thing)} has characters that cannot be printed.")
    if not thing and not empty:
        refuse(place, "an empty string.")
    return thing


def listed(thing: Any, place: Place, length: int | None = None) -> list[Any]:
    """A list, of a certain length if one is given."""
    if type(thing) is not list:
        refuse(place, f"a list is wanted, not {shown(thing)}.")
    if length is not None and len(thing) != length:
        refuse(place, f"a list of {length} is wanted, not of {len(thing)}.")
    return thing


def record(thing: Any, place: Place, wanted: Iterable[str], besides: Iterable[str] = ()) -> dict[str, Any]:
    """An object that has all keys of `wanted`, and no others than these and `besides`."""
    if type(thing) is not dict:
        refuse(place, f"an object is wanted, not {shown(thing)}.")
    for key in wanted:
        if key not in thing:
            refuse(place, f"{key} is missing.")
    if len(thing) > len(wanted := set(wanted)):
        unknown = next((key for key in thing if key not in wanted and key not in besides), None)
        if unknown is not None:
            refuse(place, f"{shown(unknown)} is no part of the format.")
    return thing
