"""How strong the changes of a LoRA file are: alpha / rank, wherever the file has alpha."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, JsonValue, PositiveInt, ValidationError
from torch import Tensor

from adatsq_trt.errors import DamagedFileError, MismatchError

PEFT_PREFIX = "base_model.model."
_ADAPTER_CONFIG = "adapter_config.json"
# Fields of peft's configuration that matter to training alone.
_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
}
_UNSET: tuple[JsonValue, ...] = (None, False, "none", [], {})
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights that training starts from


class PeftConfig(BaseModel):
    """The fields of peft's `LoraConfig` that decide what a file does.

    Attributes:
        r: rank, but for the layers of `rank_pattern`.
        lora_alpha: alpha, but for the layers of `alpha_pattern`.
        rank_pattern: regular expression of a layer's name, from its end → rank.
        alpha_pattern: likewise, alpha.
        use_rslora: alpha is divided by the square root of the rank.
        use_dora: rows have magnitudes.
        lora_bias: the second matrix has a bias.
        init_lora_weights: initialization that training started from.
        peft_type: the method.
    """

    model_config = ConfigDict(extra="allow")

    r: PositiveInt
    lora_alpha: FiniteFloat
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    peft_type: str = "LORA"

    def strength(self, layer: str) -> tuple[float, int]:
        """Return the factor of a layer's change, and the rank that the change should have."""
        from peft.utils.other import get_pattern_key

        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank), rank


def read_peft_config(file: Path, metadata: Mapping[str, str], names: list[str]) -> PeftConfig | None:
    """Peft's configuration, which diffusers writes into a file's header and peft beside the file; None without one.

    Args:
        file: the LoRA.
        metadata: its header's.
        names: of its layers.

    Raises:
        DamagedFileError: it is no configuration.
        MismatchError: it asks for something that is not followed.
    """
    text, beside = metadata.get("lora_adapter_metadata"), file.with_name(_ADAPTER_CONFIG)
    where = f"the metadata of --lora '{file}'" if text is not None else f"'{beside}'"
    if text is None:
        if not beside.is_file() or not any(name.startswith(PEFT_PREFIX) for name in names):
            return None
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        fields: dict[str, JsonValue] = json.loads(text)
        own = {key.removeprefix("transformer."): fields[key] for key in fields if not key.startswith("text_encoder")}
        config = PeftConfig.model_validate(own) if own else None
    except (ValueError, AttributeError, ValidationError) as error:
        raise DamagedFileError(
            f"{where} is no configuration of peft ({' '.join(str(error).split())}); save the LoRA again"
        ) from error
    if config is not None:
        _refuse_unknown(where, config)
    return config


def _refuse_unknown(where: str, config: PeftConfig) -> None:
    asked = {key: value for key, value in (config.model_extra or {}).items() if key not in _TRAINING}
    asked = {key: value for key, value in asked.items() if value not in _UNSET}
    if config.peft_type != "LORA":
        asked["peft_type"] = config.peft_type
    if config.init_lora_weights not in _STARTS:
        asked["init_lora_weights"] = config.init_lora_weights
    for key, value in sorted(asked.items()):
        raise MismatchError(f"{where} says {key}: {value}, which is not followed; give a plain LoRA")


def layer_strength(
    file: Path, name: str, plain_name: str, tensors: Mapping[str, Tensor], config: PeftConfig | None
) -> float:
    """Find the factor by which a layer's change is multiplied.

    Args:
        file: the LoRA.
        name: of the layer in the file.
        plain_name: without prefixes, as peft's patterns have it.
        tensors: "down" [rank, K], and perhaps "alpha", "bias" and "magnitude".
        config: the file's, or None.

    Raises:
        MismatchError: alpha is stated twice or is zero, or the file is not as its configuration says.
        DamagedFileError: alpha is no number.
    """
    rank = len(tensors["down"])
    if config is not None:
        for field, asked, part in (("use_dora", config.use_dora, "magnitude"), ("lora_bias", config.lora_bias, "bias")):
            if asked != (part in tensors):
                raise MismatchError(
                    f"--lora '{file}': '{name}' has {'no' if asked else 'a'} {part}, its configuration says {field}: "
                    f"{asked}; save the LoRA again"
                )
    if "alpha" not in tensors:
        if config is None:
            return 1.0
        strength, expected = config.strength(plain_name)
        if expected != rank:
            raise MismatchError(
                f"--lora '{file}': '{name}' has rank {rank}, its configuration says {expected}; save the LoRA again"
            )
        return strength
    if config is not None:
        raise MismatchError(
            f"--lora '{file}' states the strength of '{name}' twice, as alpha beside it and in its configuration; save "
            "it again with one of them"
        )
    alpha = tensors["alpha"]
    if alpha.numel() != 1 or not alpha.isfinite().all():
        raise DamagedFileError(f"--lora '{file}': alpha of '{name}' is {alpha.tolist()}, expected one number")
    if not alpha.any():
        raise MismatchError(
            f"--lora '{file}': alpha of '{name}' is 0, which some tools read as no change and others as the rank; save "
            "the LoRA again with its alpha"
        )
    return float(alpha) / rank
