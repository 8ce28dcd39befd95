"Two and three processes on the CPU, which talk through gloo, against one."
import os, re, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import needs_timm
from resizer_fastai.train import read_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec('accelerate'), reason='no accelerate')]
small = dict(data='sample', limit=40, arch='squeezenet1_1', size=64, out=32, bs=10, num_workers=0, precision='fp32', epochs=1, name='run')

def launch(n, cwd, *args, **kwargs):
    "`n` processes that train"
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n, '-m', 'resizer_fastai.train']
    if n==1: launcher = [Path(sys.executable).parent/'resizer_train']
    env = os.environ | dict(PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    flags = [f'--{k}={v}' for k, v in (small | kwargs).items()]
    return subprocess.Popen([*map(str, launcher), *flags, *args], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)

def train(n, cwd, *args, **kwargs):
    p = launch(n, cwd, *args, **kwargs)
    out = p.communicate(timeout=300)[0]
    assert p.returncode==0, out
    return cwd/'runs'/(small | kwargs)['name'], out

@needs_timm
@pytest.mark.parametrize('resizer', ['bilinear', 'muller'])
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path, resizer):
    "Without BatchNorm, whose statistics two processes on a CPU do not share"
    options = dict(arch='timm/convnext_atto', resizer=resizer, limit=100, lr=1e-3)
    one, _ = train(1, tmp_path, '--no-flip', name='one', bs=20, **options)
    two, out = train(2, tmp_path, '--no-flip', name='two', bs=10, **options)
    a, b = (pd.read_csv(o/'metrics.csv').drop(columns='seconds') for o in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert out.count('accuracy ')==2   # only the first process prints

def test_three_processes_count_every_validation_image_once(tmp_path):
    "40 images are 14, 13 and 13"
    run, _ = train(3, tmp_path, epochs=2)
    preds = np.load(run/'preds.npz')
    accuracy = (preds['probs'].argmax(1)==preds['targets']).mean()
    assert len(preds['targets'])==40 and read_run(run)['metrics']['accuracy']==pytest.approx(accuracy, abs=1e-6)

def children(pid):
    "Processes that `pid` started, with those that they started"
    found = [int(o) for o in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    return found + [o for p in found for o in children(p)]

def rank(pid): return re.search(rb'\0RANK=(\d+)', b'\0'+Path(f'/proc/{pid}/environ').read_bytes())

def test_killed_process_ends_the_others_and_one_process_goes_on(tmp_path):
    p = launch(2, tmp_path, epochs=500)
    while not (tmp_path/'runs/run/checkpoint/previous.pth').exists() and p.poll() is None: time.sleep(0.1)
    second = [o for o in children(p.pid) if rank(o) and rank(o)[1]==b'1']
    os.kill(second[-1], signal.SIGKILL)
    start = time.time()
    out = p.communicate(timeout=90)[0]
    assert p.returncode and time.time()-start<60
    assert all(torch.isfinite(o).all() for o in torch.load(tmp_path/'runs/run/checkpoint/last.pth', weights_only=True)['model'].values())
    p = launch(1, tmp_path, '--resume', epochs=500)
    assert any('resuming after' in line for line in p.stdout), out
    p.kill()
    p.communicate()

bad = '''
import os, torch
from resizer_fastai.all import *
class Bad(FixedResizer):
    "Not a number, in the second process, from the fourth batch on"
    n = 0
    def forward(self, x):
        self.n += self.training
        return super().forward(x)*(float('nan') if os.environ.get('RANK')=='1' and self.n>3 else 1)
resizers['bad'] = Bad
'''

def test_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    (tmp_path/'bad.py').write_text(bad)
    p, start = launch(2, tmp_path, resizer='bad', module='bad', epochs=50), time.time()
    out = p.communicate(timeout=120)[0]
    assert p.returncode and 'the loss is nan in batch' in out and time.time()-start<100, out
