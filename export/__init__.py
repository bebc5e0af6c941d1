"""From a traced model to one Q/DQ graph per distinct assignment, or one of plugin nodes, over one weight file."""

from adatsq_trt.export.graphs import Template, export_graphs
from adatsq_trt.export.plugin_graphs import export_plugin_graphs
from adatsq_trt.export.trace import trace

__all__ = ["Template", "export_graphs", "export_plugin_graphs", "trace"]
