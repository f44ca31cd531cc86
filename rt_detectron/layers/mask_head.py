"""Mask R-CNN's mask head in inference: of each object only the mask of its class, since no other is used."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn

from rt_detectron.layers.folding import is_plain


class OneClassMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's head with the same parameters; in inference the same up to float rounding.

    Detectron2 predicts a mask for each class and drops all but one. Its deconvolution writes each pixel into
    2x2 pixels that do not overlap. So it is a 1x1 convolution to four times the channels, and pixels can be
    put in their places last, when one channel is left.
    """

    forward_in_training = MaskRCNNConvUpsampleHead.forward  # for rt_detectron.attacks.batched

    def forward(self, x: Tensor, instances: list[Instances]):
        if self.training or not self._ends_as_detectron2s():
            return super().forward(x, instances)
        *convolutions, deconv, _, predictor = self
        for convolution in convolutions:
            x = convolution(x)
        classes = torch.cat([each.pred_classes for each in instances])
        if predictor.out_channels == 1:
            classes = torch.zeros_like(classes)

        count, _, height, width = x.shape
        weight = deconv.weight.permute(2, 3, 1, 0).flatten(0, 2)[..., None, None]
        x = F.relu(F.conv2d(x, weight, deconv.bias.repeat(4)), inplace=True)
        x = x.reshape(count, 4, deconv.out_channels, height * width)
        of_class = predictor.weight[classes].reshape(count, 1, 1, deconv.out_channels).to(x.dtype)
        logits = (of_class @ x).view(count, 2, 2, height, width)
        logits = logits + predictor.bias[classes].view(-1, 1, 1, 1, 1)
        logits = logits.permute(0, 3, 1, 4, 2).reshape(count, 1, 2 * height, 2 * width)
        mask_rcnn_inference(logits, instances)
        return instances

    def _ends_as_detectron2s(self) -> bool:
        """Whether nobody changed the last three layers, or looks at what they compute."""
        deconv, relu, predictor = list(self)[-3:]
        return (
            not torch.jit.is_tracing()
            and is_plain(deconv, (nn.ConvTranspose2d,))
            and is_plain(relu, (nn.ReLU,))
            and is_plain(predictor, (Conv2d,))
            and (deconv.kernel_size, deconv.stride, deconv.padding) == ((2, 2), (2, 2), (0, 0))
            and (deconv.output_padding, deconv.dilation, deconv.groups) == ((0, 0), (1, 1), 1)
            and (predictor.kernel_size, predictor.padding, predictor.groups) == ((1, 1), (0, 0), 1)
            and predictor.stride == (1, 1)
            and all(part is None for part in (predictor.norm, predictor.activation))
            and all(layer.bias is not None for layer in (deconv, predictor))
        )


def use_one_class_masks(model: nn.Module) -> nn.Module:
    """Turn the mask heads of ``model`` that are Detectron2's into :class:`OneClassMaskHead`, in place."""
    for module in model.modules():
        if type(module) is MaskRCNNConvUpsampleHead:
            module.__class__ = OneClassMaskHead
    return model
