"""The process that lays a picture out with pygraphviz; run by path, it imports nothing of the project.

    python -P _child.py FOLDER-OF-PYGRAPHVIZ FORMAT [NAME=VALUE…] < DOT text > picture

A layout that runs too long, or a fault in native code, ends this process and not the user's.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    folder, picture_format, *settings = arguments
    sys.path.insert(0, folder)
    import pygraphviz

    graph = pygraphviz.AGraph(sys.stdin.buffer.read().decode())
    for setting in settings:
        name, _, value = setting.partition("=")
        graph.graph_attr[name] = value
    picture = graph.draw(format=picture_format, prog="dot")
    sys.stdout.buffer.write(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
