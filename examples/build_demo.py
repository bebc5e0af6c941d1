"""Build the demo model for the processor of this machine and draw a digit.

python examples/build_demo.py
"""

from pathlib import Path
from typing import Any

import numpy as np

import adatsq_trt


def tell(progress: adatsq_trt.Progress) -> None:
    """One line for each task that has ended."""
    if progress.ended:
        print(f"{progress.task}: {progress.done} of {progress.total}")


def main(output: Path = Path("runs/example"), **options: Any) -> np.ndarray:
    """The pictures of two prompts, float32 [2, height, width, channels] in [0, 1]."""
    bundle = adatsq_trt.build("digits-flux", target="cpu", output=output, progress=tell, **options)
    assert bundle.summary is not None
    print(f"{bundle.summary.mean_bits:.2f} mean bits, latent MSE {bundle.summary.final_error:.1e}")
    with bundle:
        return bundle.decode(bundle.denoise(bundle.noise([1, 2]), bundle.conditioning([3, 7])))


if __name__ == "__main__":
    main()
