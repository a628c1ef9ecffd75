"""What the portable path cannot run, found out before a process is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symphony_sglang.errors import UnsupportedError

# Fields of a Hugging Face config that mean kernels the portable path does not have.
# (field, does its value ask for the feature, the feature's name)
_MODEL_FEATURES: tuple[tuple[str, str], ...] = (
    ("kv_lora_rank", "multi-head latent attention (MLA)"),
    ("num_experts", "mixture of experts"),
    ("num_local_experts", "mixture of experts"),
    ("n_routed_experts", "mixture of experts"),
    ("ssm_state_size", "state-space layers (Mamba)"),
    ("mamba_d_state", "state-space layers (Mamba)"),
    ("linear_num_value_heads", "linear attention layers"),
    ("quantization_config", "quantized weights"),
)
# What ``refuse_unsupported`` reads of SGLang's arguments.
SUPPORT_FIELDS = (
    "model_path",
    "revision",
    "speculative_algorithm",
    "quantization",
    "enable_lora",
    "lora_paths",
    "kv_cache_dtype",
)
_MODEL_TYPES = {
    "mamba": "state-space layers (Mamba)",
    "mamba2": "state-space layers (Mamba)",
    "jamba": "state-space layers (Mamba)",
}


def model_features_missing(config: Mapping[str, Any]) -> list[str]:
    """Names of the features that `config` (a model's ``config.json``) needs and CPUs lack here."""
    text = config.get("text_config")
    layers = [config, text] if isinstance(text, Mapping) else [config]
    missing: list[str] = []
    for part in layers:
        missing.extend(name for field, name in _MODEL_FEATURES if part.get(field))
        name = _MODEL_TYPES.get(str(part.get("model_type", "")))
        if name:
            missing.append(name)
    return list(dict.fromkeys(missing))


def flag_features_missing(server_args: Any) -> list[str]:
    """Features that the command line asks for and the portable path does not have."""
    wanted = {
        "--speculative-algorithm": server_args.speculative_algorithm,
        "--quantization": server_args.quantization,
        "--enable-lora": server_args.enable_lora or server_args.lora_paths,
        "--kv-cache-dtype": None
        if server_args.kv_cache_dtype in ("auto", "bf16", "bfloat16")
        else server_args.kv_cache_dtype,
    }
    return [flag for flag, value in wanted.items() if value]


def refuse_unsupported(server_args: Any) -> None:
    """Raise ``UnsupportedError`` naming each feature that cannot run on this platform.

    A model whose config cannot be read is let through: SGLang's own error is the clearer one.
    """
    flags = flag_features_missing(server_args)
    if flags:
        raise UnsupportedError(
            f"{', '.join(flags)}: not available on the portable CPU platform; "
            "drop the flag, or run on a machine with a GPU"
        )
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(
            server_args.model_path, revision=server_args.revision
        )
    except (OSError, ValueError):
        return
    missing = model_features_missing(config)
    if missing:
        raise UnsupportedError(
            f"{server_args.model_path} needs {', '.join(missing)}, which the portable CPU platform "
            "does not have; it runs dense decoder models in bf16, fp16 or fp32"
        )
