"""An FPN of segmentation_models_pytorch, trained from scribbles: a walk before the head, fused losses."""

import segmentation_models_pytorch
import torch
from synthetic import scribbled_images

import cc4s_kernels as ck
from cc4s_kernels.contrib import smp

torch.manual_seed(0)
images, labels = scribbled_images()
model = segmentation_models_pytorch.FPN("resnet18", encoder_weights=None, classes=3)
smp.insert_random_walk(model)
criterion = ck.nn.ScribbleLoss(entropy=0.1, color=0.1, num_superpixels=50)
optimizer = torch.optim.Adam(model.parameters(), 0.001)
losses = []
for _ in range(5):
    with smp.feature_size(model):
        loss = criterion(model(images), labels, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
