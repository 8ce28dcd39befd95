"Everything a notebook or a script needs: `from resizer_fastai.all import *`, after `from fastai.vision.all import *`."
from .data import *
from .resizer import *
from .learner import *
from .show import *
from .train import *
from .compare import *
from .ship import *
from .bench import *
from .check import *
