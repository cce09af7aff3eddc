"""A network of plain PyTorch, trained from scribbles with three losses in one pass."""

import torch
from synthetic import scribbled_images
from torch import nn

import cc4s_kernels as ck

torch.manual_seed(0)
images, labels = scribbled_images()
network = nn.Sequential(nn.Conv2d(3, 16, 8, 4, 2), nn.ReLU(), ck.nn.RandomWalk2d(16), nn.Conv2d(16, 3, 1))
criterion = ck.nn.ScribbleLoss(cross_entropy=1.0, entropy=0.1, color=0.1, num_superpixels=50)
optimizer = torch.optim.Adam(network.parameters(), 0.01)
losses = []
for _ in range(20):
    loss = criterion(network(images), labels, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
