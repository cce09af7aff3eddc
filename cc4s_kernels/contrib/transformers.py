"""The random walk as an attention function of transformers: softmax(scale Q Kᵀ) V in O(N) memory.

    from cc4s_kernels.contrib import transformers
    transformers.register()
    model = AutoModel.from_config(config, attn_implementation="random_walk")

It is self-attention without causality, as in vision and other encoders. What it cannot do (a causal or any other mask
over pairs, a cache, dropout of the matrix, a bias, a softcap) raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cc4s_kernels._validation import check_shape, describe
from cc4s_kernels.contrib._require import require
from cc4s_kernels.ops.random_walk import random_walk

__all__ = ["random_walk_attention", "register"]

# Arguments of attention functions that change the matrix.
REFUSED = ("position_bias", "softcap", "sliding_window", "head_mask", "s_aux", "cu_seq_lens_q")


def register(name: str = "random_walk") -> None:
    """Makes the walk an `attn_implementation` of that name.

    Raises:
        ImportError: no transformers (4.48 or newer).
    """
    require("transformers", "transformers")
    functions = require("transformers.modeling_utils", "transformers").AttentionInterface
    masks = require("transformers.masking_utils", "transformers")
    functions.register(name, random_walk_attention)
    # The mask of padding as it is given, (B, N).
    masks.AttentionMaskInterface.register(name, masks.flash_attention_mask)


def random_walk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: (B, heads, N, d). key, value: (B, heads, N, d) and (B, heads, N, D), or fewer heads that divide those
            of the query.
        attention_mask: None or (B, N), 1 = a token, 0 = padding. Outputs at padding are 0.
        dropout: has to be 0.
        scaling: factor of the scores; None = 1/sqrt(d).
        **kwargs: other arguments of transformers; those that change the matrix have to be None.

    Returns:
        (B, N, heads, D), and None for the matrix, which never exists.

    Raises:
        ValueError: something that the walk cannot do.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        raise ValueError(f"is_causal: got True for {type(module).__name__}, expected False: the walk goes both ways")
    if dropout != 0:
        raise ValueError(f"dropout: got {dropout}, expected 0: set the model's attention dropout to 0")
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got {describe(kwargs[name])}, expected None: the walk has no such term")
    if key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"key: got {key.shape[-2]} positions, expected {query.shape[-2]} as query: the walk is self-attention, "
            "without a cache"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    mask = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask: got {describe(attention_mask)}, expected None or a mask of padding (B, N)"
            )
        check_shape("attention_mask", attention_mask, (query.shape[0], query.shape[2]), "batch and positions")
        mask = attention_mask.to(torch.bool)[:, None].expand(query.shape[:-1])  # [B, heads, N]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    y = random_walk(query, key, value, mask=mask, scale=scale)
    return y.transpose(1, 2).contiguous(), None
