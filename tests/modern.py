"""The parts that GPT-2 lacks, each and all together, and their definitions in float64 NumPy."""

import jax
import numpy as np
from flax import nnx

LAYERS = 2
PARTS = {
    "rope": {"position": "rope"},
    "no_positions": {"position": "none"},
    "rms": {"norm": "rms"},
    "gelu": {"feed_forward": "gelu", "feed_forward_dim": 24},
    "relu2": {"feed_forward": "relu2"},
    "swiglu": {"feed_forward": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "grouped": {"n_kv_heads": 2},
    "one_key": {"n_kv_heads": 1},
    "soft_cap": {"logit_soft_cap": 10.0},
    "no_bias": {"bias": False},
    "values": {"value_embeddings": True},
    "window": {"sliding_window": 3},
    "pattern": {"sliding_window": 3, "window_pattern": "LS"},
    "scaled": {"embedding_scale": True},
}
ALL = {
    "position": "rope",
    "norm": "rms",
    "feed_forward": "swiglu",
    "feed_forward_dim": 40,
    "qk_norm": True,
    "n_kv_heads": 2,
    "logit_soft_cap": 20.0,
    "bias": False,
    "value_embeddings": True,
    "sliding_window": 5,
    "window_pattern": "SL",
    "embedding_scale": True,
}
CASES = {name: part | {"n_layers": LAYERS} for name, part in (PARTS | {"all": ALL}).items()}


def with_larger_weights(model):
    """Scale the parameters up, and move biases and norms, so that every part matters."""
    for seed, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        noise = jax.random.normal(jax.random.key(seed), parameter.shape)
        parameter[...] = (parameter[...] + 0.1 * noise) if parameter.ndim < 2 else 0.15 * noise
    return model


def numpy_logits(model, tokens):
    """The forward pass of one sequence, one head and one position at a time."""
    weights = {".".join(map(str, path)): np.float64(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}
    config = model.config
    heads, width = config.n_heads, config.emb_dim // config.n_heads
    kv_heads = config.n_kv_heads or heads

    def linear(x, name):
        assert config.bias or f"{name}.bias" not in weights
        return x @ weights[f"{name}.kernel"] + weights.get(f"{name}.bias", 0.0)

    def rms_norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.scale"]

    def norm(x, name):
        if config.norm == "rms":
            return rms_norm(x, name)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.scale"] + weights[f"{name}.bias"]

    def turned(x, position):
        if config.position != "rope":
            return x
        pairs = x[: width // 2] + 1j * x[width // 2 :]
        pairs = pairs * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(width // 2) / width))
        return np.concatenate([pairs.real, pairs.imag])

    def attention(x, name, layer):
        mixed = np.zeros_like(x)
        all_three = linear(x, f"{name}.query_key_value").reshape(len(x), heads + 2 * kv_heads, width)
        queries, keys, values = np.split(all_three, [heads, heads + kv_heads], axis=1)
        if f"{name}.value_embedding.table.embedding" in weights:
            rows = weights[f"{name}.value_embedding.table.embedding"][tokens].reshape(values.shape)
            values = values + weights[f"{name}.value_embedding.scale"] * rows
        if config.qk_norm:
            queries, keys = rms_norm(queries, f"{name}.query_norm"), rms_norm(keys, f"{name}.key_norm")
        pattern = config.window_pattern or "S"
        slides = config.sliding_window is not None and pattern[layer % len(pattern)] == "S"
        for head in range(heads):
            of_group = head // (heads // kv_heads)
            for now in range(len(x)):
                first = max(0, now - config.sliding_window + 1) if slides else 0
                seen = range(first, now + 1)
                query = turned(queries[now, head], now)
                scores = np.array([turned(keys[then, of_group], then) @ query for then in seen]) / np.sqrt(width)
                shares = np.exp(scores - scores.max())
                mixed[now, head * width : (head + 1) * width] = (
                    shares / shares.sum() @ values[first : now + 1, of_group]
                )
        return linear(mixed, f"{name}.output")

    def feed_forward(x, name):
        inner = linear(x, f"{name}.expand")
        if config.feed_forward == "swiglu":
            gate = linear(x, f"{name}.gate")
            inner = gate / (1 + np.exp(-gate)) * inner
        elif config.feed_forward == "relu2":
            inner = np.maximum(inner, 0) ** 2
        else:
            inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        return linear(inner, f"{name}.project")

    x = weights["token_embedding.embedding"][tokens] * (np.sqrt(config.emb_dim) if config.embedding_scale else 1)
    if config.position in (None, "learned"):
        x = x + weights["position_embedding.embedding"][: len(tokens)]
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        x = x + attention(norm(x, f"{block}.attention_norm"), f"{block}.attention", layer)
        x = x + feed_forward(norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward")
    logits = norm(x, "output_norm") @ weights["head.embedding"].T
    cap = config.logit_soft_cap
    return logits if cap is None else cap * np.tanh(logits / cap)
