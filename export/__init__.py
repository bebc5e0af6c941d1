"""From a traced model to one Q/DQ graph per distinct assignment, all over one weight file."""

from adatsq_trt.export.graphs import export_graphs
from adatsq_trt.export.trace import trace

__all__ = ["export_graphs", "trace"]
