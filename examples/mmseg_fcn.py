"""A head of mmsegmentation with our losses from its configuration, on logits that are never upsampled."""

import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from synthetic import scribbled_images

from cc4s_kernels.contrib.mmseg import FusedUpsampleMixin


@MODELS.register_module()
class FusedFCNHead(FusedUpsampleMixin, FCNHead):
    pass


torch.manual_seed(0)
images, labels = scribbled_images()
samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None].long())) for label in labels]
head = MODELS.build(
    dict(
        type="FusedFCNHead",
        in_channels=16,
        in_index=0,
        channels=16,
        num_convs=1,
        num_classes=3,
        loss_decode=[
            dict(type="CC4SPartialCrossEntropyLoss"),
            dict(type="CC4SSoftEntropyLoss", loss_weight=0.1),
        ],
    )
)
backbone = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 8, 4, 2), torch.nn.ReLU(), MODELS.build(dict(type="CC4SRandomWalk2d", in_channels=16))
)
optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], 0.01)
losses = []
for _ in range(10):
    found = head.loss([backbone(images)], samples, train_cfg=None)
    loss = sum(value for name, value in found.items() if name.startswith("loss_"))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
