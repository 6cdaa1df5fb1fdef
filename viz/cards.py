"""What stands inside the nodes of a picture: cards of operations and groups, and leaves.

A card has anchors to which lines attach: ``i0``, ``i1``… at its ports, where values come in; ``b0``, ``b1``…
beside them, where gradients go out again; ``v0``… and ``g0``… at its values and their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .markup import counted, font, html, row, shape_text, shorten, stack, table, wrapped
from .palette import FAINT, GRADIENT, GROUP, INK, LINE, PAPER, QUIET, ROLE, VALUE, Paint

__all__ = ["MORE", "Cards", "chip", "first_hidden_port", "shown_outputs"]

Facts = Mapping[str, Any]
#: The anchor of the outputs that are not shown one by one.
MORE = "more"
_MOST_PORTS, _MOST_OUTPUTS = 8, 3
_NOTHING: Mapping[int, Facts] = MappingProxyType({})


def first_hidden_port(facts: Facts) -> int:
    """The place from which on a card's inputs share one port; the number of inputs where none do."""
    count = len(facts["inputs"])
    return count if count <= _MOST_PORTS else _MOST_PORTS - 1


def shown_outputs(facts: Facts) -> list[int]:
    """The outputs that a card shows one by one: what is read or has a gradient, at least the first."""
    outputs = facts["outputs"]
    useful = [i for i, each in enumerate(outputs) if each["read"] or each["g_shape"] is not None]
    if 0 not in useful and (not useful or len(outputs) <= _MOST_OUTPUTS):
        useful = [0, *useful] if outputs else []
    return useful[:_MOST_OUTPUTS]


def chip(words: str, paint: Paint, *, port: str = "", dashed: bool = False, square: bool = False) -> str:
    """A cell with a frame; rounded, but for a leaf that is docked."""
    styles = [name for name, holds in (("rounded", not square), ("dashed", dashed)) if holds]
    style = f' style="{",".join(styles)}"' if styles else ""
    anchor = f' port="{port}"' if port else ""
    return f'<td{anchor} border="1"{style} color="{paint.line}" bgcolor="{paint.fill}">{words}</td>'


@dataclass(frozen=True)
class Cards:
    """How nodes are filled in one picture.

    Attributes:
        forward, backward: whether values are shown, and gradients.
        small: names of operations and shapes alone.
        across: values run from left to right.
        dtype: the one that goes without saying.
    """

    forward: bool = True
    backward: bool = True
    small: bool = False
    across: bool = False
    dtype: str | None = None

    def leaf(self, facts: Facts, *, anchors: bool = True) -> str:
        """A leaf: its value, and beside it its gradient."""
        cells, ports = [], ('port="v0"', 'port="g0"') if anchors else ("", "")
        if self.forward:
            cells.append(f"<td {ports[0]}>{self._words(facts)}</td>")
        if self.backward and facts["g_shape"] is not None:
            divided = f' border="1" sides="{"T" if self.across else "L"}" style="dashed" color="{GRADIENT.line}"'
            cells.append(f"<td {ports[1]}{divided if cells else ''}>{self._words(facts, gradient=True)}</td>")
        return table(self._line(cells), padding=4)

    def operation(self, facts: Facts, docked: Mapping[int, Facts] = _NOTHING, inside: str = "") -> str:
        """An operation's card; `docked` tells what stands inside its ports, by their place.

        `inside` names its scope, where no frame around it does.
        """
        if self.small:
            return self._card(facts, [f"<b>{html(shorten(facts['op']))}</b>", *self._badges(facts)], docked)
        head = " · ".join(part for part in (inside, facts["op"], facts["source"]) if part)
        lines = [font(html(shorten(head, 40)), size=9, color=QUIET)]
        lines += [font(html(each)) for each in wrapped(facts["formula"] if self.forward else _reverse(facts))]
        if self.forward and facts["params"]:
            lines += [font(html(each), size=9, color=QUIET) for each in wrapped(facts["params"], 44, 2)]
        return self._card(facts, [*lines, *self._badges(facts)], docked)

    def group(self, facts: Facts, docked: Mapping[int, Facts] = _NOTHING) -> str:
        """The card of several operations: how many, which, and what leaves went inside."""
        count = counted(facts["count"], "operation")
        named = facts["formula"] != count
        lines = [f"<b>{html(shorten(facts['formula'], 36))}</b>"] if named else []
        lines.append(font(html(count), size=9 if named else 12, color=QUIET if named else INK))
        lines += [font(html(each), size=9, color=QUIET) for each in wrapped(facts["pattern"], 44)]
        for role in ROLE:
            inside = [each for each in facts["folded"] if each["role"] == role]
            if inside:
                text = f"{counted(len(inside), role)}, {counted(sum(e['elements'] for e in inside), 'element')}"
                lines.append(font(html(text), size=9, color=QUIET))
        return self._card(facts, [*lines, *self._badges(facts)], docked, line=GROUP.line, fill=GROUP.fill)

    # -- parts of a card

    def _card(
        self, facts: Facts, middle: Sequence[str], docked: Mapping[int, Facts], *, line: str = LINE, fill: str = PAPER
    ) -> str:
        """Ports, what stands in the middle, values with their gradients."""
        parts = []
        if ports := self._ports(facts, docked):
            parts.append(f"<td>{table(self._line(ports), spacing=2)}</td>")
        parts.append(f'<td cellpadding="7">{stack(middle)}</td>')
        if values := self._values(facts):
            parts.append(f"<td>{table(self._line(values), spacing=3, padding=4)}</td>")
        rows = row(parts) if self.across else "".join(row([part]) for part in parts)
        width = 2 if facts["role"] == "result" else 1
        return table(rows, padding=3, look=f'border="{width}" style="rounded" color="{line}" bgcolor="{fill}"')

    def _line(self, cells: Sequence[str]) -> str:
        """Cells side by side across the way that values run."""
        return "".join(row([cell]) for cell in cells) if self.across else row(cells)

    def _ports(self, facts: Facts, docked: Mapping[int, Facts]) -> list[str]:
        inputs, most = facts["inputs"], first_hidden_port(facts)
        ports = [self._dock(docked[i]) if i in docked else self._port(i, each) for i, each in enumerate(inputs[:most])]
        if len(inputs) > most:
            sends = self.backward and any(each["g_shape"] is not None for each in inputs[most:])
            rest = chip(font(f"+{len(inputs) - most} more", size=9, color=QUIET), VALUE)
            ports.append(self._anchored(most, rest, both=self.forward and sends))
        return ports

    def _port(self, place: int, facts: Facts) -> str:
        """An input port: a chip, and at its edge an anchor for each line that ends or begins there."""
        facts = {**facts, "name": facts["label"]}
        sends = self.backward and facts["g_shape"] is not None
        paint = ROLE.get(facts["role"], VALUE) if self.forward else Paint(FAINT, PAPER)
        value = chip(self._words(facts), paint)
        gradient = chip(self._words(facts, gradient=True), GRADIENT, dashed=True)
        return self._anchored(place, gradient if sends and not self.forward else value, both=self.forward and sends)

    def _dock(self, facts: Facts) -> str:
        """A port in which a leaf stands: filled as it would be on its own, in square corners, without lines."""
        if self.forward or (self.backward and facts["g_shape"] is not None):
            return chip(self.leaf(facts, anchors=False), ROLE[facts["role"]], square=True)
        return chip(table(row([f"<td>{self._words(facts)}</td>"]), padding=4), Paint(FAINT, PAPER), square=True)

    def _anchored(self, place: int, cell: str, *, both: bool) -> str:
        names = [f"i{place}", f"b{place}"] if both else [f"i{place}"]
        inside = table(row([cell]), padding=4)
        if self.across:  # above and below the chip, where the left edge is that of all the others
            anchors = [row([f'<td port="{name}" height="4"></td>']) for name in names]
            return f"<td>{table(''.join([anchors[0], row([f'<td>{inside}</td>']), *anchors[1:]]))}</td>"
        anchors = [f'<td port="{name}" width="20" height="1"></td>' for name in names]
        whole = f'<td colspan="{len(names)}">{inside}</td>'
        return f"<td>{table(row(anchors) + row([whole]))}</td>"

    def _values(self, facts: Facts) -> list[str]:
        cells, shown = [], shown_outputs(facts)
        for i in shown:
            each = facts["outputs"][i]
            if self.forward:
                cells.append(chip(self._words(each), VALUE, port=f"v{i}"))
            if self.backward and each["g_shape"] is not None:
                cells.append(chip(self._words(each, gradient=True), GRADIENT, port=f"g{i}", dashed=True))
        if len(facts["outputs"]) > len(shown):
            rest = font(f"+{len(facts['outputs']) - len(shown)} more", size=9, color=QUIET)
            cells.append(chip(rest, VALUE, port=MORE))
        return cells

    def _words(self, facts: Facts, *, gradient: bool = False) -> str:
        """A name over a shape, as they stand in a port, a value or a gradient."""
        shape = shape_text(facts["g_shape"] if gradient else facts["shape"])
        if not gradient and facts["dtype"] != self.dtype:
            shape += f" {facts['dtype']}"
        ink, quiet = (GRADIENT.line, GRADIENT.line) if gradient else (INK, QUIET)
        if self.small:
            return font(html(shape), size=10, color=quiet)
        name = html(shorten(facts.get("g_name", facts["name"]), 22) + ".g" if gradient else shorten(facts["name"], 22))
        return stack([font(f"<b>{name}</b>", color=ink), font(html(shape), size=9, color=quiet)])

    def _badges(self, facts: Facts) -> list[str]:
        text = html(" · ".join(facts["marks"]))
        return [font(f"<i>{text}</i>", size=9, color=QUIET)] if text else []


def _reverse(facts: Facts) -> str:
    """What an operation's rule does: ``X.g, w.g = lin_grad(Z.g, …)``."""
    given = ", ".join(dict.fromkeys(f"{each['label']}.g" for each in facts["inputs"] if each["g_shape"] is not None))
    taken = ", ".join(f"{each['name']}.g" for each in facts["outputs"] if each["g_shape"] is not None)
    rule = f"vjp of {facts['op']}" if facts["rule"] == "borrowed" else facts["rule"]
    return f"{given} = {rule}({taken}, …)" if given else str(rule)
