"""``genai_config.json``: what onnxruntime-genai must know to generate with an exported directory.

Invariant: it is made from the model's own configuration and from the shapes of the graph, and names no machine.
"""

from __future__ import annotations

from typing import Any

CONFIG_NAME, GRAPH_NAME = "genai_config.json", "model.onnx"


def genai_config(model: Any, names: list[str], past_shape: tuple[int, ...], library: str | None) -> dict[str, Any]:
    """Return the configuration of a decoder.

    Args:
        model: the transformers model.
        names: of the graph's inputs.
        past_shape: of a layer's keys: (B, heads, length, dim).
        library: file name of the native library in the directory; None without.
    """
    config, generation = model.config.get_text_config(), model.generation_config
    context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2048)
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        session["custom_ops_library"] = library
    end = _first(generation.eos_token_id, config.eos_token_id, 0)
    return {
        "model": {
            "bos_token_id": _single(_first(generation.bos_token_id, config.bos_token_id, end)),
            "eos_token_id": end,
            "pad_token_id": _single(_first(generation.pad_token_id, config.pad_token_id, end)),
            "context_length": context,
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": session,
                "filename": GRAPH_NAME,
                "head_size": past_shape[3],
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": sum(name.endswith(".key") for name in names),
                "num_key_value_heads": past_shape[1],
                "inputs": _inputs(names),
                "outputs": {"logits": "logits"} | {f"present_{k}_names": f"present.%d.{k}" for k in ("key", "value")},
            },
        },
        "search": _search(generation, context),
    }


def _inputs(names: list[str]) -> dict[str, str]:
    """Return the names of the graph's inputs by what they are."""
    plain = {name: name for name in names if not name.startswith("past_key_values.")}
    return plain | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}


def _search(generation: Any, context: int) -> dict[str, Any]:
    """Return how to choose tokens: as the model's own generation_config.json says."""
    return {
        "do_sample": bool(generation.do_sample),
        "early_stopping": True,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": float(_first(generation.repetition_penalty, 1.0)),
        "temperature": float(_first(generation.temperature, 1.0)),
        "top_k": int(_first(generation.top_k, 50)),
        "top_p": float(_first(generation.top_p, 1.0)),
    }


def _first(*candidates: Any) -> Any:
    """Return the first that is not None."""
    return next(candidate for candidate in candidates if candidate is not None)


def _single(token: Any) -> Any:
    return token[0] if isinstance(token, list) else token
