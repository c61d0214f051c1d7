"""What PEFT can train and a .salr file cannot hold exactly: types, settings and starts, each with its reason.

Invariant: every type and every setting of PEFT is either understood here or refused by name; one that is unknown is
refused too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...formats.errors import AdapterError

_PROMPT = "trains virtual tokens or cached keys, which are no weights of the model"
_ORTHOGONAL = "multiplies the weight by an orthogonal matrix, a change of full rank"
_FULL = "its change of a weight has full rank"
_SPARSE = "changes single weights anywhere in the matrix, which is no product of two small factors"
_GATED = "its change depends on the input"
_SHARED = "builds its factors from vectors that layers share, which PEFT alone can expand"

#: PEFT type -> why it is refused
TYPES = {
    "ADALORA": "its trained singular values and rank mask stand between the factors",
    "ADAMSS": "learns updates of clustered subspaces of the weight's SVD",
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "trains biases by themselves",
    "BOFT": _ORTHOGONAL,
    "C3A": f"convolves in blocks: {_FULL}",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "DEFT": "projects a part of the weight out before it adds its own",
    "DELORA": "normalises its factors by the weight's norms",
    "FOURIERFT": f"is a sum of Fourier components: {_FULL}",
    "FROD": f"rotates and rescales a shared decomposition: {_FULL}",
    "GLORA": "scales and shifts weight and bias element by element",
    "GRALORA": f"is low-rank in blocks only: as a whole {_FULL}",
    "HIRA": f"multiplies the weight element by element: {_FULL}",
    "HRA": _ORTHOGONAL,
    "IA3": "rescales rows or columns of the weight, not by a low-rank sum",
    "LILY": f"routes between shared factors: {_GATED}",
    "LN_TUNING": "trains norms by themselves",
    "LOHA": "is an element-wise product of two low-rank matrices, of rank r * r",
    "LOKR": f"is a Kronecker product: {_FULL}",
    "MISS": f"adds one small matrix to every block of the weight: {_FULL}",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _ORTHOGONAL,
    "OSF": "retrains the weight itself outside a protected subspace",
    "PEANUT": f"passes the weight through a small network: {_FULL}",
    "POLY": f"routes between adapters by task: {_GATED}",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": "turns a principal subspace of the weight",
    "PVERA": "samples its factors from vectors that layers share",
    "P_TUNING": _PROMPT,
    "RANDLORA": f"sums scaled random factors: {_FULL}",
    "ROAD": "rotates and rescales pairs of outputs, a change of full rank",
    "SHADOW": "runs a second network beside the model",
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "TINYLORA": _SHARED,
    "TRAINABLE_TOKENS": "replaces embedding rows alone; as trainable_token_indices of a LoRA they are kept",
    "UNILORA": _SHARED,
    "VBLORA": _SHARED,
    "VERA": _SHARED,
    "WAVEFT": f"is a sum of wavelets: {_FULL}",
    "XLORA": f"weighs several adapters by the input: {_GATED}",
}

#: setting of a LoRA -> why it is refused
SETTINGS = {
    "alora_invocation_tokens": "aLoRA is active for a part of the prompt only",
    "use_qalora": "QALoRA pools its inputs",
    "arrow_config": "Arrow routes between adapters by the input",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA truncates the base weight and trains singular values between the factors",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors in a layout of its own",
    "velora_config": "VeLoRA was not compared with PEFT here",
    "megatron_config": "Megatron's parallel layers have other weights",
}

#: beginning of init_lora_weights -> why it is refused
STARTS = {
    "pissa_niter": "PiSSA's fast start is a randomized SVD, so the factors that were taken out of the base cannot be "
    "made again",
    "corda": "CorDA took factors out of the base that depend on its calibration data",
    "loftq": "LoftQ trained on a quantized base that is not stored with it",
    "lora_ga": "LoRA-GA took factors out of the base that depend on gradients",
}

#: settings that change nothing here, or are resolved where they are used
UNDERSTOOD = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "qalora_group_size", "layer_replication", "runtime_config", "lora_bias", "target_parameters",
    "ensure_weight_tying", "modules_to_tie",
})  # fmt: skip
#: starts that leave the base as it is, besides true and false, and those whose factors can be made again
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "olora", "pissa")


def check_config(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse what has no exact form.

    Raises:
        AdapterError: another PEFT type, or a setting or start that is refused or unknown.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        reason = TYPES.get(str(kind), "is no type that this version knows")
        raise _refused(directory, f"PEFT type {kind} is not a LoRA: it {reason}".replace("it its", "its"))
    for key, value in config.items():
        if value and key in SETTINGS:
            raise _refused(directory, SETTINGS[key])
        if value and key not in UNDERSTOOD:
            raise _refused(directory, f"setting {key!r} is unknown to this version")
    if config.get("use_dora") and config.get("lora_bias"):
        raise _refused(directory, "DoRA with lora_bias has no form that PEFT itself agrees on")
    _check_start(config.get("init_lora_weights"), directory)


def _check_start(start: object, directory: Path) -> None:
    if not isinstance(start, str):
        return
    for beginning, reason in STARTS.items():
        if start.lower().startswith(beginning):
            raise _refused(directory, f"init_lora_weights={start!r}: {reason}")
    if start.lower() not in _PLAIN_STARTS:
        raise _refused(directory, f"init_lora_weights={start!r} is unknown to this version")


def _refused(directory: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{reason}, which has no exact form here",
        path=directory,
        needed="a LoRA that is a sum of low-rank factors",
        fix="merge it into its base with peft's merge_and_unload and convert the result",
    )
