"""What a GPU has to prove, without installation and network: `make gpu`, or `PYTHONPATH=. python3 tests/gpu.py`.

Prints one line per case, `ok` or `FAILED` with its seconds, and exits with status 1 if any failed. `--limit 20` is a small
version, which also runs on a CPU: there the comparisons with the CPU and the precisions say little."""
import argparse, json, os, platform, subprocess, sys, tempfile, time, traceback
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

tmp = tempfile.TemporaryDirectory(prefix='resizer_gpu')
os.environ['RESIZER_CACHE'] = tmp.name
home = Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()
if not (home/'data'/'resizer_sample-1').is_dir(): os.environ['FASTAI_HOME'] = tmp.name   # before fastai reads it

import fastai, pandas as pd, torch
from fastai.vision.all import Callback, ConvLayer, ResBlock, bn_types, default_device, set_seed
from torch import nn
from resizer_fastai.bench import BenchModel, bench_model
from resizer_fastai.data import get_dls
from resizer_fastai.learner import (Autocast, FiniteLoss, RecalibrateBN, ResizerClassifier, bodies, plain_head,
                                    precision_cbs, resizer_learner)
from resizer_fastai.resizer import Resizer, make_resizer, resizers

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('--data', default='sample', help='sample, or a folder with train and val')
parser.add_argument('--limit', type=int, help='take this many images of each split, and small models')
parser.add_argument('--out', help='write the results to this JSON file')
args = parser.parse_args()
device = torch.device(default_device())
if device.type == 'cpu' and not args.limit: sys.exit('gpu.py: no GPU found; --limit 20 runs a small version on the CPU')

def tiny(pretrained):
    "A ResNet with one block, and the pooling that fastai cuts it at"
    block = ResBlock(1, 16, 32, stride=2)
    return nn.Sequential(ConvLayer(3, 16, stride=2), block, nn.AdaptiveAvgPool2d(1), nn.Linear(1, 1))

bodies['tiny'] = tiny
train_on, step_of = dict(arch='resnet50', size=64, n_steps=60), dict(arch='resnet50', size=448, out=224, bs=32)
if args.limit: train_on, step_of = dict(arch='tiny', size=16, n_steps=20), dict(arch='resnet18', size=64, out=32, bs=4)
backend = 'aot_eager' if device.type == 'cpu' else 'inductor'   # which takes minutes on a CPU
cases = {}
def case(f): cases[f.__name__] = f

@contextmanager
def no_tf32():
    "Convolutions in full float32"
    was, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try: yield
    finally: torch.backends.cudnn.allow_tf32 = was

def assert_close(xs, ys, tol):
    "The largest difference in any tensor, as a share of that tensor's largest value, if it is at most `tol`"
    pairs = [(x.detach().double().cpu(), y.detach().double().cpu()) for x, y in zip(xs, ys, strict=True)]
    apart = torch.stack([(x-y).abs().max()/y.abs().max().clamp(min=1e-12) for x, y in pairs]).max().item()
    assert apart <= tol, f'{apart:.1e} apart, more than {tol}'
    return apart

def after_backward(model, x, on=device):
    "Output, gradients and buffers of a training step on `on`, of a copy"
    model, x = deepcopy(model).to(on), x.to(on, copy=True).requires_grad_()
    y = model(x)
    (y*torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=on).view_as(y)).sum().backward()
    return [y, x.grad, *[p.grad for p in model.parameters()], *model.buffers()]

def loaders(**kwargs):
    "Training and validation loaders at twice the target size"
    bs, size = 10 if args.limit else 50, 2*train_on['size']
    return get_dls(args.data, size=size, limit=args.limit or 1000, **dict(bs=bs, num_workers=0) | kwargs)

@lru_cache
def dls(): return loaders()

def learner(*cbs):
    "The same weights each time"
    set_seed(0)
    arch, size = train_on['arch'], train_on['size']
    return resizer_learner(dls(), arch, size=size, pretrained=False, cbs=cbs, path=tmp.name, **plain_head)

class Losses(Callback):
    "Losses and the scaler of training"
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())
    def before_step(self): self.scaler = getattr(self.learn, 'scaler', None)

def fit(learn, lr=1e-3):
    epochs = -(-train_on['n_steps']//len(dls().train))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)

def trained(learn):
    "First and last losses of a training that worked"
    learn.add_cbs([Losses(), FiniteLoss()])
    fit(learn)
    losses = torch.tensor(learn.losses.losses)
    first, last = losses[:5].mean().item(), losses[-5:].mean().item()
    assert losses.isfinite().all() and last < first, f'the loss went from {first:.2f} to {last:.2f}'
    return dict(first_loss=first, last_loss=last)

@case
@no_tf32()
def resizers_equal_the_cpu():
    "Output, gradients and statistics: in float64 to 1e-9, in float32 to 1e-3"
    res = {}
    for dtype, tol in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        for name in resizers:
            torch.manual_seed(0)
            resizer, x = make_resizer(name, (24, 40)).to(dtype), torch.randn(4, 3, 48, 96, dtype=dtype)
            for p in resizer.parameters(): nn.init.normal_(p, std=0.3)   # MULLER starts at zero
            apart = assert_close(after_backward(resizer, x), after_backward(resizer, x, 'cpu'), tol)
            res[str(dtype)[6:]] = max(apart, res.get(str(dtype)[6:], 0))
    return res

@case
def train_fp32(): return trained(learner(*precision_cbs('fp32')))

@case
def train_bf16(): return trained(learner(*precision_cbs('bf16')))

@case
def train_fp16():
    "With a scaler for the gradients"
    if device.type != 'cuda': return 'skipped: needs CUDA'
    learn = learner(*precision_cbs('fp16'))
    res = trained(learn)
    assert learn.losses.scaler.is_enabled() and learn.scaler is None
    return res | dict(scale=learn.losses.scaler.get_scale())

@case
@no_tf32()
def checkpoint_changes_nothing():
    "Output, gradients and statistics: in float64 to 1e-9, in float32 to 1e-3"
    res, plain, x = {}, Resizer(48), torch.randn(4, 3, 96, 96)
    other = deepcopy(plain)
    other.checkpoint = True
    for dtype, tol in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        both = [after_backward(m.to(dtype), x.to(dtype)) for m in (other, plain)]
        res[str(dtype)[6:]] = assert_close(*both, tol)
    return res

def step_memory(checkpoint):
    "Peak memory of a training step in bytes; on a CPU, bytes saved for backward"
    model = BenchModel(Resizer(step_of['out'], checkpoint=checkpoint), step_of['arch'], step_of['size'], step_of['bs'])
    if device.type != 'cuda': return model.saved()
    for _ in range(2): model.train()
    torch.cuda.reset_peak_memory_stats()
    model.train()
    return torch.cuda.max_memory_allocated()

@case
def checkpoint_needs_less_memory():
    plain, checkpoint = step_memory(False), step_memory(True)
    assert checkpoint < plain, f'{checkpoint/1e6:.0f} MB with it, {plain/1e6:.0f} MB without'
    return dict(plain_mb=plain/1e6, checkpoint_mb=checkpoint/1e6)

@case
def compiled_equals_eager():
    "Output, gradients and statistics of the joint model in float64, to 1e-6"
    plain, x = learner().model.double(), dls().one_batch()[0].double()
    other = deepcopy(plain)
    other.compile(backend=backend)
    res = []
    for m in (other, plain):
        y = m(x)
        y.square().mean().backward()
        res.append([y, *[p.grad for p in m.parameters()], *m.buffers()])
    return dict(apart=assert_close(*res, 1e-6))

@case
def compiled_model_trains():
    learn = learner(*precision_cbs())
    learn.model.compile(backend=backend)
    return trained(learn)

@case
def cache_on_the_device_changes_no_batch():
    "Equal to batches that two worker processes read; the cache needs none"
    cached, plain = loaders(cache='device', num_workers=2), loaders(num_workers=2)
    assert cached.train.fake_l.num_workers == 0
    n = 0
    for (x, y), (x2, y2) in zip(cached.valid, plain.valid, strict=True):
        assert x.device.type == device.type and torch.equal(x, x2) and torch.equal(y, y2)
        n += len(x)
    return dict(images=n)

@case
def autocast_is_off_after_an_interrupted_batch():
    def interrupt(*_): raise KeyboardInterrupt
    learn = learner(Autocast())
    learn.model.body.register_forward_hook(interrupt)
    try: fit(learn)
    except KeyboardInterrupt: pass
    assert not torch.is_autocast_enabled(device.type)

@case
def recalibrated_statistics_are_the_same_under_autocast():
    "Those of the resizer in float32 and bfloat16, to 0.05"
    def statistics(*cbs):
        learn = learner(RecalibrateBN(), *cbs)
        fit(learn, 0.)
        norms = [m for m in learn.model.resizer.modules() if isinstance(m, bn_types)]
        assert all(m.momentum == 0.1 and m.running_var.dtype == torch.float32 for m in norms)
        return [o for m in norms for o in (m.running_mean, m.running_var)]
    return dict(apart=assert_close(statistics(Autocast()), statistics(), 0.05))

@case
@no_tf32()
def saved_here_predicts_the_same_on_the_cpu():
    "Probabilities, to 1e-3"
    learn, files = learner(), list(dls().valid_ds.items[:4])
    learn.save_pretrained(Path(tmp.name)/'model')
    model = ResizerClassifier.from_pretrained(Path(tmp.name)/'model')
    assert {p.device.type for p in model.parameters()} == {'cpu'}
    return dict(apart=assert_close([model.predict(files)[2]], [learn.model.predict(files)[2]], 1e-3))

@case
def two_processes_take_the_steps_of_one():
    "With NCCL and SyncBatchNorm on two GPUs, on a CPU with gloo and without BatchNorm: losses and accuracy, to 1e-3"
    if device.type=='cuda' and torch.cuda.device_count()<2: return 'skipped: needs two GPUs'
    if not find_spec('accelerate'): return 'skipped: needs accelerate'
    arch = 'resnet18' if device.type=='cuda' else 'vgg11'
    flags = f'--data=sample --limit=40 --arch={arch} --resizer=bilinear --size=64 --out=32 --epochs=2 --no-flip --precision=fp32'
    def metrics(n):
        launcher = f'-m torch.distributed.run --standalone --nproc_per_node={n} -m resizer_fastai.train'.split()
        subprocess.run([sys.executable, *launcher, *flags.split(), f'--bs={20//n}', f'--runs={tmp.name}', f'--name=of-{n}',
                        '--num_workers=0'], check=True, stdout=subprocess.DEVNULL)
        return torch.tensor(pd.read_csv(Path(tmp.name)/f'of-{n}'/'metrics.csv').drop(columns='seconds').values)
    return dict(apart=assert_close([metrics(2)], [metrics(1)], 1e-3))

@case
def step_time():
    "Not a test: a training step beside that of the body alone"
    df = bench_model(**step_of, rounds=2 if args.limit else 5)
    return dict(body_ms=df.train_ms.body) | {f'{k}_x': df.train_x[k] for k in df.index[1:]}

def run(name, f):
    "A row of results; prints its line"
    start = time.perf_counter()
    try: ok, detail = True, f()
    except Exception as e:
        traceback.print_exc()
        ok, detail = False, f'{type(e).__name__}: {e}'
    seconds = time.perf_counter()-start
    is_dict = isinstance(detail, dict)
    text = ' '.join(f'{k}={v:.4g}' for k, v in detail.items()) if is_dict else detail or ''
    print(f'{"ok" if ok else "FAILED":6} {name:52} {seconds:6.1f} s  {text}', flush=True)
    return dict(name=name, ok=ok, seconds=round(seconds, 1), detail=detail)

name = torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine()
versions = dict(python=platform.python_version(), fastai=fastai.__version__, torch=torch.__version__)
versions['cuda'] = torch.version.cuda
print(f'{device.type}: {name},', ', '.join(f'{k} {v}' for k, v in versions.items()), flush=True)
results = [run(k, f) for k, f in cases.items()]
report = dict(device=name, versions=versions, args=vars(args), results=results)
if args.out: Path(args.out).write_text(json.dumps(report, indent=1))
tmp.cleanup()
sys.exit(not all(o['ok'] for o in results))
