"""The bodies of the experiments on headroom: `resizer_compare --module bodies`, in this folder or with it in PYTHONPATH"""
from fastai.vision.all import AdaptiveAvgPool, ConvLayer, Flatten, ResBlock, nn
from resizer_fastai.learner import bodies

def stage(n_in, n_out): return nn.Sequential(ResBlock(1, n_in, n_out, stride=2), ResBlock(1, n_out, n_out))

def small_xresnet(pretrained=False):
    "An xresnet of three stages with two blocks each: 0.7 million parameters"
    return nn.Sequential(ConvLayer(3, 16, stride=2), stage(16, 32), stage(32, 64), stage(64, 128),
                         AdaptiveAvgPool(1), Flatten(), nn.Linear(128, 1))

bodies['small_xresnet'] = small_xresnet
