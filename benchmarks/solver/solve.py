"""One layer by one solver, in a process of its own: reads weight and Hessian, writes rounded weight and seconds.

python solve.py ours|peer PROBLEM.safetensors RESULT.safetensors
"""

import sys
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP, DAMPING = 64, 0.01


def ours(weight: Tensor, hessian: Tensor) -> Tensor:
    from adatsq_trt.calibration.gptq import gptq
    from adatsq_trt.formats import format_named
    from adatsq_trt.quantizers import dequantize_weight

    fmt = format_named("w4a4")
    assert fmt.weight.group_size == GROUP
    return dequantize_weight(gptq(weight, hessian, fmt, damping=DAMPING), fmt)


def peer(weight: Tensor, hessian: Tensor) -> Tensor:
    """llmcompressor's GPTQ with its default observer, and the columns in the order of the diagonal, as ours."""
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    order = ActivationOrdering.WEIGHT
    scheme = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP, actorder=order)
    groups = weight.unflatten(1, (-1, GROUP))
    scale, zero_point = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), scheme)
    stacked = [tensor[None] for tensor in (weight, hessian, scale, zero_point)]
    values: Tensor = quantize_weight(*stacked, global_scale=None, quant_args=scheme, percdamp=DAMPING)[0][0]
    return values


def main() -> None:
    solver: Callable[[Tensor, Tensor], Tensor] = {"ours": ours, "peer": peer}[sys.argv[1]]
    problem = load_file(sys.argv[2])
    # Imports and first calls are not what is compared.
    solver(torch.randn(GROUP, 2 * GROUP), torch.eye(2 * GROUP))
    wall, processor = time.perf_counter(), time.process_time()
    values = solver(problem["weight"].clone(), problem["hessian"].clone())
    seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - processor], dtype=torch.float64)
    save_file({"values": values.contiguous(), "seconds": seconds}, sys.argv[3])


if __name__ == "__main__":
    main()
