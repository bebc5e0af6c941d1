"""A policy by hand, beside the one that the search finds: the first and last step in fp8, the others in nvfp4.

python examples/own_policy.py
"""

from pathlib import Path
from typing import Any

import adatsq_trt


def main(output: Path = Path("runs/own-policy"), **options: Any) -> tuple[float, float]:
    """Latent MSE of the policy by hand and of the searched one, on the same held-out samples."""
    searched = adatsq_trt.search_policy("digits-flux", target="sm120", output=output / "searched", **options)
    rows = [["nvfp4"] * len(searched.layers) for _ in range(searched.steps)]
    rows[0] = rows[-1] = ["fp8"] * len(searched.layers)
    own = adatsq_trt.Policy.from_steps(searched.model, searched.weights_sha256, searched.layers, rows)
    judged = adatsq_trt.search_policy("digits-flux", target="sm120", output=output / "own", policy=own, **options)
    assert judged.error is not None
    assert searched.error is not None
    print(f"by hand: {judged.mean_bits:.2f} bits, {judged.error:.1e}")
    print(f"searched: {searched.mean_bits:.2f} bits, {searched.error:.1e}")
    return judged.error, searched.error


if __name__ == "__main__":
    main()
