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
        return model_from_megatron(_words(text, source=str(path)), name=path.stem, source=str(path))
    content = parse_yaml(text, source=str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: neither a model description, nor a config.json, nor Megatron flags (which begin --)")
    if "model_type" in content or "architectures" in content:
        return model_from_huggingface(content, name=_folder_name(path), source=str(path))
    return validate(ModelSpec, content, source=str(path))


def _words(text: str, *, source: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"{source}: not a list of flags: {error}") from None


def _folder_name(path: Path) -> str:
    return path.resolve().parent.name if path.stem == "config" else path.stem


#: Most of anything that is counted, and of layers, which are gone through one by one.
MOST, MOST_LAYERS = 10_000_000, 1000


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

    def need_int(self, *names: str, least: int = 0, most: int = MOST) -> int:
        """A whole number; ``most`` keeps slips of the pen from being computed with."""
        self.need(*names)
        return self.whole(*names, least=least, most=most)

    def whole(self, *names: str, default: int = 0, least: int = 0, most: int = MOST) -> int:
        """A whole number that may be missing."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.get(name, default=default)
        number = _whole(value)
        if number is None:
            raise ValueError(f"{self.source}: {name}: a whole number is needed (got {value!r})")
        if not least <= number <= most:
            raise ValueError(f"{self.source}: {name}: a number from {least:,} to {most:,} is needed (got {value!r})")
        return number

    def listed(self, name: str) -> list[Any]:
        """A list that may be missing."""
        value = self.get(name, default=[])
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.source}: {name}: a list is needed (got {value!r})")
        return list(value)


def _whole(value: object) -> int | None:
    """``value`` as a whole number; None where it is none: truth values, fractions, infinity."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        return None
    if not isinstance(value, int | float | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


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
    num_layers = f.need_int("num_hidden_layers", least=1, most=MOST_LAYERS)
    moe_hidden = f.need_int("moe_intermediate_size", "intermediate_size", least=1)
    shared = f.whole("shared_expert_intermediate_size", default=f.whole("n_shared_experts") * moe_hidden)
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
        "dense_ffn_hidden_size": f.need_int("intermediate_size", least=1) if dense else 0,
        "attention": _huggingface_attention(f, model_type, num_layers),
        "moe": {
            "num_experts": f.need_int("n_routed_experts", "num_local_experts", "num_experts", least=1),
            "top_k": f.need_int("num_experts_per_tok", "experts_per_token", least=1),
            "ffn_hidden_size": moe_hidden,
            "shared_ffn_hidden_size": shared,
            "shared_gate": f.get("shared_expert_intermediate_size") is not None,
            "expert_bias": is_gpt_oss,
            "router_bias": is_gpt_oss or f.get("topk_method") == "noaux_tc",
            "num_groups": f.whole("n_group", default=1, least=1),
            "topk_groups": f.whole("topk_group", default=1, least=1),
        },
    }
    return validate(ModelSpec, content, source=source)


def _huggingface_dense_layers(f: _Fields, num_layers: int) -> tuple[int, ...]:
    first = f.whole("first_k_dense_replace")
    every = f.whole("moe_layer_freq", "decoder_sparse_step", default=1, least=1)
    listed = [_whole(each) for each in f.listed("mlp_only_layers")]
    if None in listed:
        raise ValueError(f"{f.source}: mlp_only_layers: whole numbers are needed (got {f.get('mlp_only_layers')!r})")
    # Qwen counts from 1 (layer i is sparse if (i + 1) % step == 0), DeepSeek from 0.
    shift = 1 if "decoder_sparse_step" in f.values else 0
    return tuple(i for i in range(num_layers) if i < first or (i + shift) % every or i in listed)


def _huggingface_attention(f: _Fields, model_type: str, num_layers: int) -> dict[str, Any]:
    heads = f.need_int("num_attention_heads", least=1)
    if f.get("kv_lora_rank") is not None:
        return {
            "kind": "mla",
            "num_heads": heads,
            "q_lora_rank": f.whole("q_lora_rank"),
            "kv_lora_rank": f.need_int("kv_lora_rank", least=1),
            "qk_head_dim": f.need_int("qk_nope_head_dim", least=1),
            "qk_rope_dim": f.need_int("qk_rope_head_dim", least=1),
            "v_head_dim": f.need_int("v_head_dim", least=1),
        }
    is_qwen2, is_gpt_oss = model_type == "qwen2_moe", model_type == "gpt_oss"
    window = f.whole("sliding_window") if f.get("use_sliding_window", default=True) else 0
    kinds = f.listed("layer_types") or ["sliding_attention" if window else "full_attention"] * num_layers
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(kinds) != num_layers:
        raise ValueError(
            f"{f.source}: layer_types: sliding_attention or full_attention for each of {num_layers} layers is needed "
            f"(got {len(kinds)} entries{f', {unknown[0]!r} among them' if unknown else ''})"
        )
    return {
        "kind": "gqa",
        "num_heads": heads,
        "num_query_groups": f.whole("num_key_value_heads", default=heads, least=1),
        "head_dim": f.whole("head_dim", default=f.need_int("hidden_size") // heads, least=1),
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
    num_layers = f.need_int("--num-layers", least=1, most=MOST_LAYERS)
    hidden = f.need_int("--hidden-size", least=1)
    gated = bool(f.get("--swiglu"))
    ffn = f.whole(
        "--ffn-hidden-size", default=int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden, most=10 * MOST
    )
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
            "num_experts": f.need_int("--num-experts", least=1),
            "top_k": f.whole("--moe-router-topk", default=2, least=1),
            "ffn_hidden_size": f.whole("--moe-ffn-hidden-size", default=ffn, least=1),
            "shared_ffn_hidden_size": f.whole("--moe-shared-expert-intermediate-size"),
            "shared_gate": bool(f.get("--moe-shared-expert-gate")),
            "expert_bias": bias,
            "num_groups": f.whole("--moe-router-num-groups", default=1, least=1),
            "topk_groups": f.whole("--moe-router-group-topk", default=1, least=1),
        },
    }
    return validate(ModelSpec, content, source=source)


def _padded_vocabulary(f: _Fields) -> int:
    if f.get("--padded-vocab-size") is not None:
        return f.need_int("--padded-vocab-size")
    multiple = f.whole("--make-vocab-size-divisible-by", default=128, least=1)
    multiple *= f.whole("--tensor-model-parallel-size", default=1, least=1)
    return -(-f.need_int("--vocab-size") // multiple) * multiple


def _megatron_attention(f: _Fields, hidden: int, *, bias: bool) -> dict[str, Any]:
    heads = f.need_int("--num-attention-heads", least=1)
    if f.get("--multi-latent-attention"):
        return {
            "kind": "mla",
            "num_heads": heads,
            "q_lora_rank": f.whole("--q-lora-rank"),
            "kv_lora_rank": f.whole("--kv-lora-rank", default=32, least=1),
            "qk_head_dim": f.whole("--qk-head-dim", default=128, least=1),
            "qk_rope_dim": f.whole("--qk-pos-emb-head-dim", default=64, least=1),
            "v_head_dim": f.whole("--v-head-dim", default=128, least=1),
        }
    grouped = f.get("--group-query-attention")
    return {
        "kind": "gqa",
        "num_heads": heads,
        "num_query_groups": f.whole("--num-query-groups", default=1, least=1) if grouped else heads,
        "head_dim": f.whole("--kv-channels", default=hidden // heads, least=1),
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
    left = numbers if isinstance(numbers, int) else (numbers or [None])[0]
    if not isinstance(left, int):
        raise ValueError(f"{f.source}: --window-size: one number or LEFT,RIGHT is needed (got {size!r})")
    window = left + 1
    skip = f.get("--window-attn-skip-freq")
    if skip is None:
        return (window,)
    pattern = _evaluate(f, "--window-attn-skip-freq", skip)
    if isinstance(pattern, int):
        if not 1 <= pattern <= MOST_LAYERS:
            raise ValueError(f"{f.source}: --window-attn-skip-freq: a number from 1 to {MOST_LAYERS:,} is needed")
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
