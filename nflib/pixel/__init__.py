"""Autoregressive models of images: PixelRNN, PixelCNN, Gated PixelCNN, PixelCNN++.

    log P(x) = sum_i log P(x_i | x_1 .. x_{i-1})

over pixels in raster order, exact in nats for images of 1 or 3 channels and any number of grey
levels. All have the same `log_prob` and `sample` as a flow, see `nflib.pixel.model`.
"""

from nflib.pixel.cnn import PixelCNN, masked_conv
from nflib.pixel.gated import GatedPixelCNN
from nflib.pixel.model import PixelModel
from nflib.pixel.plusplus import PixelCNNPP
from nflib.pixel.rnn import PixelRNN
from nflib.pixel.window import WindowConv, channel_mask

__all__ = [
    "GatedPixelCNN",
    "PixelCNN",
    "PixelCNNPP",
    "PixelModel",
    "PixelRNN",
    "WindowConv",
    "channel_mask",
    "masked_conv",
]
