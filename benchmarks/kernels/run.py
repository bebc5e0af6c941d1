"""The plugin's kernels on this machine's GPU: correctness, then time beside PyTorch's own kernels.

    python benchmarks/kernels/run.py

Needs torch with CUDA and the Triton language, and nothing else: adatsq-trt does not have to be installed. Writes
results.json beside this file; without a GPU it writes nothing and says so.
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the benchmark; the exit code is 2 without a GPU and 1 when a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--tuning", type=Path, help="table of tiles (default: the package's)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The checkout is the package: plugins/ lies beside adatsq_trt/, where an installation would map it.
    sys.path.insert(0, str(ROOT))
    import adatsq_trt

    adatsq_trt.__path__.append(str(ROOT))
    from adatsq_trt.errors import AdatsqError
    from adatsq_trt.plugins.benchmark import benchmark

    try:
        benchmark(arguments.output, arguments.tuning)
    except AdatsqError as error:
        logging.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
