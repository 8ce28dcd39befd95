__version__ = "0.1.0"

import warnings
with warnings.catch_warnings(action='ignore', category=FutureWarning): import fastai.vision.all   # which still uses torch.jit.script
