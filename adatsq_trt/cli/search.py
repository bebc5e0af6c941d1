"""`adatsq-trt search`: the stages up to `search`."""

from __future__ import annotations

from adatsq_trt.cli.build import StageName, until

search = until(StageName.SEARCH, "Search the policy: a format for every step and layer.")
