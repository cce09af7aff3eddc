"""transformers: models whose attention is the walk give what their own attention gives."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, ViTConfig, ViTModel

from cc4s_kernels.contrib import transformers
from tests.integrations.examples import losses_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _registered() -> None:
    transformers.register()


def twins(kind: type[PreTrainedModel], config: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with its own attention and one with the walk, of the same weights."""
    torch.manual_seed(0)
    eager = kind._from_config(config, attn_implementation="eager").eval()
    walk = kind._from_config(config, attn_implementation="random_walk").eval()
    walk.load_state_dict(eager.state_dict())
    return eager, walk


def test_vision_transformer() -> None:
    eager, walk = twins(ViTModel, ViTConfig(**SMALL, image_size=32, patch_size=8))
    images = torch.rand(2, 3, 32, 32)
    results = []
    for model in (eager, walk):
        out = model(images).last_hidden_state
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        # float32 through two layers.
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * max(1.0, a.abs().max().item()))


def test_padding() -> None:
    config = BertConfig(**SMALL, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    eager, walk = twins(BertModel, config)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        a, b = (model(input_ids=tokens, attention_mask=mask).last_hidden_state for model in (eager, walk))
    # Outputs at padding differ (the walk gives 0 there), and nothing else reads them.
    torch.testing.assert_close(b[mask.bool()], a[mask.bool()], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        unmasked = walk(input_ids=tokens).last_hidden_state
    assert (unmasked[1, :6] - b[1, :6]).abs().max() > 1e-3


def test_causal_models_are_refused() -> None:
    config = LlamaConfig(**SMALL, vocab_size=50)
    model = LlamaModel._from_config(config, attn_implementation="random_walk").eval()
    with pytest.raises(ValueError, match="is_causal: got True"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_dropout_is_refused() -> None:
    config = ViTConfig(**SMALL, image_size=32, patch_size=8, attention_probs_dropout_prob=0.1)
    model = ViTModel._from_config(config, attn_implementation="random_walk").train()
    with pytest.raises(ValueError, match=r"dropout: got 0\.1"):
        model(torch.rand(1, 3, 32, 32))


def test_example() -> None:
    losses = losses_of("transformers_vit.py")
    assert losses[-1] < losses[0]
