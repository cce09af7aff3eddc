"""A DeepLabV3 of torchvision, trained from scribbles: a random walk before the classifier, losses at feature size."""

import torch
from synthetic import scribbled_images
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import cc4s_kernels as ck
from cc4s_kernels.contrib import torchvision

torch.manual_seed(0)
images, labels = scribbled_images()
model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
torchvision.insert_random_walk(model)
# torchvision upsamples with align_corners=False.
criterion = ck.nn.ScribbleLoss(entropy=0.1, color=0.1, num_superpixels=50, align_corners=False)
optimizer = torch.optim.Adam(model.parameters(), 0.001)
losses = []
for _ in range(5):
    loss = torchvision.loss(criterion, torchvision.logits(model, images), labels, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
