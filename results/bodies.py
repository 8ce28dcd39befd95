"""The bodies of the experiments on headroom: `resizer_compare --module bodies`, in this folder or with it in PYTHONPATH"""
from fastai.vision.all import AdaptiveAvgPool, ConvLayer, Flatten, ResBlock, nn
from resizer_fastai.learner import bodies

def small_xresnet(pretrained=False):
    "An xresnet of three stages with a block each: 0.3 million parameters"
    return nn.Sequential(ConvLayer(3, 16, stride=2), ResBlock(1, 16, 32, stride=2), ResBlock(1, 32, 64, stride=2),
                         ResBlock(1, 64, 128, stride=2), AdaptiveAvgPool(1), Flatten(), nn.Linear(128, 1))

bodies['small_xresnet'] = small_xresnet
