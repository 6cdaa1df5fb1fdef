"""Programs in files: a safetensors file with the tensors as payload, and the program itself as JSON beside them.

`header` makes the JSON of a frozen tape, `container` writes and reads the file, `reader` makes a frozen tape of
it again and takes nothing on trust (`checked`, `params`, `allowed`, `arguments`), and `shapes` holds the shapes
that the file tells against those that its operations give.
"""

from __future__ import annotations

from .allowed import Table
from .container import opened_file, path_of, write
from .header import written
from .reader import Read, read
from .shapes import check_shapes

__all__ = ["Read", "Table", "check_shapes", "opened_file", "path_of", "read", "write", "written"]
