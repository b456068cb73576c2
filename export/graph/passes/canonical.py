"""Pass: one way to write a graph. Equal models give equal bytes, in any process and at any time.

Engines, their cache and a refit know a segment by the hash of its file. What may differ between two
exports of one model, and says nothing to an engine, is put in order or dropped: the order of the
initializers (``extract`` collects them in a set), and what the exporter notes about its sources.
"""

from __future__ import annotations

import onnx_ir as ir


def canonical(graph: ir.Graph) -> None:
    """Sort the initializers by name; drop descriptions and metadata of the graph and its parts."""
    named = [graph.initializers.pop(name) for name in sorted(graph.initializers)]
    for value in named:
        graph.register_initializer(value)
    produced = [value for node in graph for value in node.outputs]
    for part in (graph, *graph, *graph.inputs, *named, *produced):
        part.metadata_props.clear()
        part.doc_string = None
