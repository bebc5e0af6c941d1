"""The architectures that there are adapters for."""

from __future__ import annotations

from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.models.z_image import ZImageAdapter

# diffusers' class name → adapter.
ADAPTERS: dict[str, type[PromptedAdapter]] = {
    kind.architecture: kind for kind in (FluxAdapter, ZImageAdapter, WanAdapter)
}
