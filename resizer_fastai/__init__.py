import warnings
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)   # fastai calls it on import
__version__ = "0.2.0"
