"""SmoothQuant and SVDQuant by NVIDIA's Model Optimizer, on this project's grids: rows of the comparison.

modelopt changes the transformer in place and rounds in its own modules, so a peer gets a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import util
from typing import Any

from torch import nn

from adatsq_trt.errors import DependencyError
from adatsq_trt.evaluation.methods import Method, Peer
from adatsq_trt.formats import GROUP

STRENGTH = 0.5  # SmoothQuant's α
_OFF: dict[str, Any] = {"quantizer_name": "*", "enable": False}


def require_peers(methods: Iterable[Method]) -> list[Method]:
    """The same methods; refuses those whose library is not there, before anything runs.

    Raises:
        DependencyError: names the first of them.
    """
    wanted = list(methods)
    for method in wanted:
        if method.peer is not None and util.find_spec("modelopt") is None:
            raise DependencyError(
                f"method '{method.name}' needs the library modelopt; install it with: pip install 'adatsq-trt[peers]', "
                "or leave the method out of --methods"
            )
    return wanted


def apply_peer(
    peer: Peer,
    transformer: nn.Module,
    layers: Sequence[str],
    bits: tuple[int, int],
    rank: int,
    run: Callable[[], object],
) -> None:
    """Quantize the layers of a transformer in place.

    Args:
        peer: the one whose method is used.
        transformer: in full precision.
        layers: module paths.
        bits: of weights and activations.
        rank: of SVDQuant's branch.
        run: sends the calibration samples through the transformer.
    """
    import modelopt.torch.quantization as mtq

    def forward_loop(_model: nn.Module) -> None:
        run()

    blocks, static = {"block_sizes": {-1: GROUP}}, {"axis": None}
    if peer is Peer.SVDQUANT:
        algorithm: dict[str, Any] = {"method": "svdquant", "lowrank": rank}
        first = [_OFF, *_grids(layers, "weight", blocks, bits[0]), *_grids(layers, "input", static, bits[1])]
    else:
        # modelopt smooths layers with 8-bit grids only and skips the others with a warning. The scales that it
        # computes do not depend on the bits, so the weights' grid changes afterwards.
        algorithm = {"method": "smoothquant", "alpha": STRENGTH}
        first = [_OFF, *_grids(layers, "weight", {"axis": 0}, 8), *_grids(layers, "input", static, 8)]
    mtq.quantize(transformer, {"quant_cfg": first, "algorithm": algorithm}, forward_loop)
    if peer is Peer.SMOOTHQUANT:
        mtq.set_quantizer_by_cfg(transformer, _grids(layers, "weight", blocks, bits[0]))
        _forget(transformer, layers, "weight")
        mtq.calibrate(transformer, "max", forward_loop)
    # Both algorithms calibrate with static inputs only; scales for each token need no calibration.
    _forget(transformer, layers, "input")
    by_token = {"type": "dynamic", "block_sizes": {-1: None}}
    mtq.set_quantizer_by_cfg(transformer, _grids(layers, "input", by_token, bits[1]))


def _forget(transformer: nn.Module, layers: Sequence[str], kind: str) -> None:
    """Drop calibrated scales, whose shape belongs to the grid before."""
    for layer in layers:
        quantizer: Any = transformer.get_submodule(f"{layer}.{kind}_quantizer")
        quantizer.reset_amax()


def _grids(layers: Sequence[str], kind: str, grid: dict[str, Any], bits: int) -> list[dict[str, Any]]:
    """The grid of the layers' weights or inputs, as modelopt is told."""
    return [{"quantizer_name": f"{layer}.{kind}_quantizer", "cfg": {"num_bits": bits, **grid}} for layer in layers]
