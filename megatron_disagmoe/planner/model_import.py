"""Models from elsewhere: a Hugging Face ``config.json`` or the argument list of a Megatron training command."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_disagmoe.planner.files import find_config, parse_yaml, read_text, validate
from megatron_disagmoe.planner.model_spec import ModelSpec


def load_model(name_or_path: str) -> ModelSpec:
    """A shipped model by name, or a file: our YAML, a Hugging Face ``config.json``, or Megatron flags as text.

    Raises:
        ValueError: naming the file and the field.
        OSError: not readable.
    """
    path = find_config("models", name_or_path)
    text = read_text(path)
    if text.lstrip().startswith("--"):
        return model_from_megatron(shlex.split(text, comments=True), name=path.stem, source=str(path))
    content = parse_yaml(text, source=str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: neither a model description, nor a config.json, nor Megatron flags (which begin --)")
    if "model_type" in content or "architectures" in content:
        return model_from_huggingface(content, name=_folder_name(path), source=str(path))
    return validate(ModelSpec, content, source=str(path))


def _folder_name(path: Path) -> str:
    return path.resolve().parent.name if path.stem == "config" else path.stem


class _Fields:
    """Looks fields up and remembers where they come from, for messages."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise ValueError(f"{self.source}: {' or '.join(names)}: missing")
        return value

    def need_int(self, *names: str) -> int:
        value = self.need(*names)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(f"{self.source}: {names[0]}: a whole number is needed (got {value!r})") from None


def model_from_huggingface(config: Mapping[str, Any], *, name: str, source: str = "config.json") -> ModelSpec:
    """A model from its ``config.json``: DeepSeek (V1 to V3), Mixtral, Qwen2/3-MoE and GPT-OSS field names.

    Raises:
        ValueError: a field is missing or wrong, or the model has no experts.
    """
    f = _Fields(config, source)
    experts = f.get("n_routed_experts", "num_local_experts", "num_experts")
    if experts is None:
        raise ValueError(
            f"{source}: n_routed_experts, num_local_experts, num_experts: all missing; no mixture of experts"
        )
    model_type = str(f.get("model_type", default=""))
    num_layers = f.need_int("num_hidden_layers")
    moe_hidden = f.get("moe_intermediate_size", "intermediate_size")
    shared = f.get("shared_expert_intermediate_size")
    if shared is None:
        shared = int(f.get("n_shared_experts", default=0)) * int(moe_hidden or 0)
    dense = _huggingface_dense_layers(f, num_layers)
    is_gpt_oss = model_type == "gpt_oss"
    content = {
        "name": name,
        "sources": (source,),
        "num_layers": num_layers,
        "hidden_size": f.need_int("hidden_size"),
        "vocab_size": f.need_int("vocab_size"),
        "tied_embeddings": bool(f.get("tie_word_embeddings", default=False)),
        "dense_layers": dense,
        "dense_ffn_hidden_size": f.get("intermediate_size", default=0) if dense else 0,
        "attention": _huggingface_attention(f, model_type, num_layers),
        "moe": {
            "num_experts": experts,
            "top_k": f.need("num_experts_per_tok", "experts_per_token"),
            "ffn_hidden_size": f.need("moe_intermediate_size", "intermediate_size"),
            "shared_ffn_hidden_size": shared,
            "shared_gate": f.get("shared_expert_intermediate_size") is not None,
            "expert_bias": is_gpt_oss,
            "router_bias": is_gpt_oss or f.get("topk_method") == "noaux_tc",
            "num_groups": f.get("n_group", default=1),
            "topk_groups": f.get("topk_group", default=1),
        },
    }
    return validate(ModelSpec, content, source=source)


def _huggingface_dense_layers(f: _Fields, num_layers: int) -> tuple[int, ...]:
    first = int(f.get("first_k_dense_replace", default=0))
    every = int(f.get("moe_layer_freq", "decoder_sparse_step", default=1))
    listed = set(f.get("mlp_only_layers", default=()))
    # Qwen counts from 1 (layer i is sparse if (i + 1) % step == 0), DeepSeek from 0.
    shift = 1 if "decoder_sparse_step" in f.values else 0
    return tuple(i for i in range(num_layers) if i < first or (i + shift) % every or i in listed)


def _huggingface_attention(f: _Fields, model_type: str, num_layers: int) -> dict[str, Any]:
    heads = f.need_int("num_attention_heads")
    if f.get("kv_lora_rank") is not None:
        return {
            "kind": "mla",
            "num_heads": heads,
            "q_lora_rank": f.get("q_lora_rank", default=0),
            "kv_lora_rank": f.need("kv_lora_rank"),
            "qk_head_dim": f.need("qk_nope_head_dim"),
            "qk_rope_dim": f.need("qk_rope_head_dim"),
            "v_head_dim": f.need("v_head_dim"),
        }
    is_qwen2, is_gpt_oss = model_type == "qwen2_moe", model_type == "gpt_oss"
    window = f.get("sliding_window", default=0) if f.get("use_sliding_window", default=True) else 0
    kinds = f.get("layer_types", default=["sliding_attention" if window else "full_attention"])
    return {
        "kind": "gqa",
        "num_heads": heads,
        "num_query_groups": f.get("num_key_value_heads", default=heads),
        "head_dim": f.get("head_dim", default=f.need_int("hidden_size") // heads),
        "qk_norm": model_type.startswith("qwen3"),
        "qkv_bias": bool(f.get("attention_bias", default=is_qwen2)),
        "output_bias": bool(f.get("attention_bias", default=False)),
        "sinks": is_gpt_oss,
        "sliding_windows": _shortest_period([window if kind == "sliding_attention" else 0 for kind in kinds]),
    }


def _shortest_period(values: Sequence[int]) -> tuple[int, ...]:
    for period in range(1, len(values) + 1):
        if all(values[i] == values[i % period] for i in range(len(values))):
            return tuple(values[:period])
    return tuple(values)


_TRUE_FLAGS = frozenset(
    ("swiglu", "disable_bias_linear", "untie_embeddings_and_output_weights", "group_query_attention", "qk_layernorm")
) | {"multi_latent_attention", "add_qkv_bias", "moe_shared_expert_gate"}


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Megatron's flags as a mapping: ``--num-layers 4`` gives ``{"num_layers": "4"}``; a flag without value is true."""
    values: dict[str, Any] = {}
    words = list(argv)
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        name = name.replace("-", "_")
        following = words[position + 1] if position + 1 < len(words) else "--"
        if value:
            values[name] = value
        elif name in _TRUE_FLAGS or following.startswith("--"):
            values[name] = True
        else:
            values[name] = following
    return values


def model_from_megatron(argv: Sequence[str], *, name: str, source: str = "Megatron flags") -> ModelSpec:
    """A model from the argument list of a Megatron-LM 0.19 training command; defaults are Megatron's.

    Raises:
        ValueError: a flag is missing or wrong, or the model has no experts.
    """
    return model_from_values(parse_flags(argv), name=name, source=source)


def model_from_values(flags: Mapping[str, Any], *, name: str, source: str = "Megatron flags") -> ModelSpec:
    """A model from Megatron's flags by their names in its namespace (``num_layers``, ...); None is not given.

    Raises:
        ValueError: a flag is missing or wrong, or the model has no experts.
    """
    f = _Fields({f"--{key.replace('_', '-')}": value for key, value in flags.items()}, source)
    num_layers = f.need_int("--num-layers")
    hidden = f.need_int("--hidden-size")
    gated = bool(f.get("--swiglu"))
    ffn = int(f.get("--ffn-hidden-size", default=int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden))
    bias = not f.get("--disable-bias-linear")
    dense = _megatron_dense_layers(f, num_layers)
    learned = f.get("--position-embedding-type", default="learned_absolute") == "learned_absolute"
    content = {
        "name": name,
        "sources": (source,),
        "num_layers": num_layers,
        "hidden_size": hidden,
        "vocab_size": _padded_vocabulary(f),
        "tied_embeddings": not f.get("--untie-embeddings-and-output-weights"),
        "learned_positions": f.need_int("--max-position-embeddings") if learned else 0,
        "gated": gated,
        "layer_norm": f.get("--normalization", default="LayerNorm") == "LayerNorm",
        "linear_bias": bias,
        "dense_layers": dense,
        "dense_ffn_hidden_size": ffn if dense else 0,
        "attention": _megatron_attention(f, hidden, bias=bias),
        "moe": {
            "num_experts": f.need("--num-experts"),
            "top_k": f.get("--moe-router-topk", default=2),
            "ffn_hidden_size": f.get("--moe-ffn-hidden-size", default=ffn),
            "shared_ffn_hidden_size": f.get("--moe-shared-expert-intermediate-size", default=0),
            "shared_gate": bool(f.get("--moe-shared-expert-gate")),
            "expert_bias": bias,
            "num_groups": f.get("--moe-router-num-groups", default=1),
            "topk_groups": f.get("--moe-router-group-topk", default=1),
        },
    }
    return validate(ModelSpec, content, source=source)


def _padded_vocabulary(f: _Fields) -> int:
    if f.get("--padded-vocab-size") is not None:
        return f.need_int("--padded-vocab-size")
    multiple = int(f.get("--make-vocab-size-divisible-by", default=128))
    multiple *= int(f.get("--tensor-model-parallel-size", default=1))
    return -(-f.need_int("--vocab-size") // multiple) * multiple


def _megatron_attention(f: _Fields, hidden: int, *, bias: bool) -> dict[str, Any]:
    heads = f.need_int("--num-attention-heads")
    if f.get("--multi-latent-attention"):
        return {
            "kind": "mla",
            "num_heads": heads,
            "q_lora_rank": f.get("--q-lora-rank", default=0),
            "kv_lora_rank": f.get("--kv-lora-rank", default=32),
            "qk_head_dim": f.get("--qk-head-dim", default=128),
            "qk_rope_dim": f.get("--qk-pos-emb-head-dim", default=64),
            "v_head_dim": f.get("--v-head-dim", default=128),
        }
    grouped = f.get("--group-query-attention")
    return {
        "kind": "gqa",
        "num_heads": heads,
        "num_query_groups": f.get("--num-query-groups", default=1) if grouped else heads,
        "head_dim": f.get("--kv-channels", default=hidden // heads),
        "qk_norm": bool(f.get("--qk-layernorm")),
        "qkv_bias": bias or bool(f.get("--add-qkv-bias")),
        "output_bias": bias,
        "sliding_windows": _megatron_windows(f),
    }


def _megatron_windows(f: _Fields) -> tuple[int, ...]:
    size = f.get("--window-size")
    if size is None:
        return (0,)
    numbers = _evaluate(f, "--window-size", size)
    # Megatron's window (left, right) leaves out the token itself.
    window = (numbers[0] if isinstance(numbers, list | tuple) else numbers) + 1
    skip = f.get("--window-attn-skip-freq")
    if skip is None:
        return (window,)
    pattern = _evaluate(f, "--window-attn-skip-freq", skip)
    if isinstance(pattern, int):
        return tuple(0 if (i + 1) % pattern == 0 else window for i in range(pattern))
    return tuple(window if each else 0 for each in pattern)


def _megatron_dense_layers(f: _Fields, num_layers: int) -> tuple[int, ...]:
    frequency = _evaluate(f, "--moe-layer-freq", f.get("--moe-layer-freq", default=1))
    if isinstance(frequency, int):
        if frequency < 1:
            raise ValueError(f"{f.source}: --moe-layer-freq: must be at least 1 (got {frequency})")
        return tuple(i for i in range(num_layers) if i % frequency)
    if len(frequency) != num_layers:
        raise ValueError(f"{f.source}: --moe-layer-freq: {len(frequency)} entries for {num_layers} layers")
    return tuple(i for i, is_moe in enumerate(frequency) if not is_moe)


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda left, right: left + right,
    ast.Mult: lambda left, right: left * right,
}


def _evaluate(f: _Fields, name: str, text: object) -> Any:
    """A number, or a list expression such as ``([0]*3+[1]*58)``, without Python's ``eval``."""
    try:
        return _value(ast.parse(str(text), mode="eval").body)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"{f.source}: {name}: neither a number nor a list expression (got {text!r})") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        size = max(abs(each) for each in (left, right) if isinstance(each, int)) if isinstance(node.op, ast.Mult) else 0
        if size > 100_000:
            raise ValueError("too long")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError("not a list expression")
