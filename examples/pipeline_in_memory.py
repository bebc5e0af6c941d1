"""Search a policy for a diffusers pipeline that is loaded already; the pipeline is not changed.

python examples/pipeline_in_memory.py black-forest-labs/FLUX.1-schnell
"""

import sys
from typing import Any

import adatsq_trt


def main(pipe: Any, **options: Any) -> adatsq_trt.SearchedPolicy:
    """A policy of formats that Blackwell GPUs accelerate."""
    policy = adatsq_trt.search_policy(pipe, target="sm120", **options)
    for format_name, error in policy.uniform_errors.items():
        print(f"{format_name} everywhere: latent MSE {error}")
    print(f"{policy.mean_bits:.2f} bits by the policy: latent MSE {policy.error}")
    return policy


if __name__ == "__main__":
    from diffusers import DiffusionPipeline

    main(DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype="auto"))
