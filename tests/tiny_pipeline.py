"""A bundle of the tiny Flux, and the rest of a FluxPipeline in diffusers' own classes, all with random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.models.adapter import Conditioning
from adatsq_trt.models.flux import FluxAdapter, rotations
from tests.tiny_bundle import write_bundle
from tests.tiny_flux import make_tiny_flux

PATCHES, WIDTH, TEXT_TOKENS, PROMPTS = 4, 32, 8, 10
WORDS = ("a", "red", "three", "and", "green", "seven")


def make_adapter() -> FluxAdapter:
    return make_tiny_flux(WIDTH, PATCHES, shift=3.0)


def make_flux_bundle(
    folder: Path, variants: Sequence[str] = ("cpu",), layout: Layout = "embedded", lora_slots: int | None = None
) -> BundleFiles:
    """For prompts of `TEXT_TOKENS` tokens, as the pipeline's text encoders make them."""
    adapter, rows = make_adapter(), 20
    adapter.trace_module().text_ids = torch.zeros(TEXT_TOKENS, 3)
    latents = torch.randn(rows, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": latents, **_condition(rows, seed=0), "timestep": torch.full((rows,), 0.5)}
    stored = Conditioning(_condition(PROMPTS, seed=1), _condition(1, seed=2))
    return write_bundle(folder, adapter, inputs, stored, variants=variants, layout=layout, lora_slots=lora_slots)


def make_sized_bundle(
    folder: Path, *grids: tuple[int, int], variants: Sequence[str] = ("cpu",), layout: Layout = "embedded"
) -> BundleFiles:
    """The same for its own size and others, each given in rows and columns of tokens."""
    adapter, rows = make_adapter(), 20
    any_size = adapter.any_size()
    any_size.module.text_ids = rotations(adapter.transformer, torch.zeros(TEXT_TOKENS, 3))
    latents = torch.randn(rows, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": latents, **_condition(rows, seed=0), "timestep": torch.full((rows,), 0.5)}
    stored = Conditioning(_condition(PROMPTS, seed=1), _condition(1, seed=2))
    others = [adapter.resized(adapter.image.resized(*grid)) for grid in grids]
    return write_bundle(folder, adapter, inputs, stored, any_size, others, variants, layout=layout)


def _condition(prompts: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(prompts, TEXT_TOKENS, WIDTH, generator=generator),
        "pooled_projections": torch.randn(prompts, WIDTH, generator=generator),
    }


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """One token for each of the words, and merges of two symbols that build CLIP's."""
    vocabulary, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1}, []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for symbol in (*map(str, "abcdefghijklmnopqrstuvwxyz"), *symbols):
            vocabulary.setdefault(symbol, len(vocabulary))
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols[:2] = ["".join(pair)]
            vocabulary.setdefault(symbols[0], len(vocabulary))
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
