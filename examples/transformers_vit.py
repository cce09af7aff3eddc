"""A vision transformer of transformers whose attention is the random walk, in O(N) memory."""

import torch
from synthetic import scribbled_images
from torch import nn
from transformers import ViTConfig, ViTModel

import cc4s_kernels as ck
from cc4s_kernels.contrib import transformers

torch.manual_seed(0)
transformers.register()
images, labels = scribbled_images()
config = ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=8
)
config._attn_implementation = "random_walk"
backbone = ViTModel(config, add_pooling_layer=False)
classifier = nn.Conv2d(48, 3, 1)
criterion = ck.nn.PartialCrossEntropyLoss()
optimizer = torch.optim.Adam([*backbone.parameters(), *classifier.parameters()], 0.003)
losses = []
for _ in range(10):
    tokens = backbone(images).last_hidden_state[:, 1:]  # without the class token: [B, 8 * 8, 48]
    loss = criterion(classifier(tokens.mT.unflatten(2, (8, 8))), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
