"""Pictures of what `tape_engine` recorded: graphs, drawings and tables.

    import viz

    viz.draw(C).save("graph.png")    # or .svg, .pdf, .html, .dot, .mmd
    print(viz.table(C))
    viz.graph(C)                     # a networkx.MultiDiGraph

The engine never imports this package; Graphviz is started when something is drawn, in a process of its own.
"""

from __future__ import annotations

from .drawing import Drawing, draw
from .errors import LayoutError, NotSweptError, OptionError
from .graph import graph
from .table import table

__all__ = ["Drawing", "LayoutError", "NotSweptError", "OptionError", "draw", "graph", "table"]
