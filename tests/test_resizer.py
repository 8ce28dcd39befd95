"What crosses the resizer's own notebook: kept weights, memory, half precision, compiling, tracing and exporting."
from copy import deepcopy
import pytest, torch
from conftest import repo
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from resizer_fastai.resizer import MullerResizer, Resizer, make_resizer, resizer_config, resizers

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def after_a_step(model, x, autocast=False):
    "Output, gradients and buffers after one training step"
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *[p.grad for p in model.parameters()], *[b for b in model.buffers()]]

def saved_bytes(model, x):
    "Bytes of activations that a training step in bfloat16 saves for backward"
    saved, known = {}, {o.untyped_storage().data_ptr() for o in [*model.parameters(), x]}
    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu', torch.bfloat16): y = model(x)
    return sum(v for k, v in saved.items() if k not in known)

def test_kept_weights_load_and_give_the_same_images():
    "Weights and three values that version 1 (commit 028a298) printed for this input"
    resizer = Resizer(96)
    resizer.load_state_dict(load_file(repo/'tests'/'resizer.safetensors'))
    x = torch.linspace(-2, 2, 3*40*56).view(1, 3, 40, 56).sin() * torch.arange(56)/28
    with torch.no_grad(): y = resizer.eval()(x, (20, 28))
    torch.testing.assert_close(torch.stack([y.mean(), y.std(), y[0, 1, 5, 7]]), torch.tensor([-1.116649, 6.368543, 3.815140]))

@pytest.mark.parametrize('kwargs', [{}, dict(num_resblocks=0), dict(antialias=True), dict(in_channels=1), dict(size=(9, 14))])
def test_checkpoint_in_bfloat16_changes_nothing(kwargs):
    plain = Resizer(**dict(size=16) | kwargs)
    other = deepcopy(plain)
    other.checkpoint = True
    x = torch.rand(2, kwargs.get('in_channels', 3), 37, 50)
    for a, b in zip(after_a_step(plain, x, True), after_a_step(other, x, True), strict=True): assert torch.equal(a, b)

def test_checkpoint_keeps_a_mean_over_all_batches():
    "`momentum=None`, as `RecalibrateBN` has it"
    plain = Resizer(16)
    plain.stem[-1].momentum = None
    other = deepcopy(plain)
    other.checkpoint = True
    for _ in range(3):
        x = torch.rand(2, 3, 32, 32)
        for m in (plain, other): after_a_step(m, x)
    for a, b in zip(plain.buffers(), other.buffers()): torch.testing.assert_close(a, b)

def test_checkpoint_saves_less_than_half_of_the_activations():
    "At most 0.45 of what the plain module without in-place activations saves"
    plain = Resizer(112)
    for m in plain.modules():
        if isinstance(m, nn.LeakyReLU): m.inplace = False
    x = torch.rand(2, 3, 224, 224)
    assert saved_bytes(Resizer(112, checkpoint=True), x) <= 0.45*saved_bytes(plain, x)

@pytest.mark.parametrize('checkpoint', [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_resizer_is_the_plain_one(checkpoint):
    plain = Resizer(16, checkpoint=checkpoint)
    other = deepcopy(plain)
    other.compile(fullgraph=True)
    x = torch.rand(2, 3, 32, 32)
    for a, b in zip(after_a_step(plain, x), after_a_step(other, x), strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

@pytest.mark.filterwarnings('ignore')
def test_trace_at_twice_the_target_takes_any_size():
    resizer = Resizer(224).eval()
    with torch.no_grad():
        traced = torch.jit.trace(resizer, torch.rand(1, 3, 448, 448))
        x = torch.rand(2, 3, 300, 500)
        torch.testing.assert_close(traced(x), resizer(x))

@pytest.mark.parametrize('name', ['learned', 'muller', 'antialias', 'blurred'])
def test_export_with_a_dynamic_size(name):
    resizer, dim = make_resizer(name, 16).eval(), torch.export.Dim.AUTO
    program = torch.export.export(resizer, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: dim, 2: dim, 3: dim}, None)[:1])
    x = torch.rand(3, 3, 40, 56)
    torch.testing.assert_close(program.module()(x), resizer(x))

@pytest.mark.parametrize('name', [k for k in resizers if k != 'none'])
def test_resizer_is_copied_moved_and_differentiated(name):
    resizer = make_resizer(name, 8)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    y = deepcopy(resizer).double().eval()(x)
    grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()   # gradients of gradients
    assert y.dtype == torch.float64 and x.grad.isfinite().all()

def test_every_block_reads_the_block_before_it():
    resizer, seen = Resizer(32).eval(), []
    resizer.blocks[1].register_forward_pre_hook(lambda m, inp: seen.append(inp[0]))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        resizer(x)
        nn.init.zeros_(resizer.blocks[0].bn2.weight)
        resizer(x)
    assert not torch.equal(*seen)

@pytest.mark.parametrize('kwargs', [dict(weights='resnet18'), dict(num_layers=3, weights='resnet50')])
def test_muller_refuses_weights_that_it_does_not_have(kwargs):
    with pytest.raises(ValueError, match='weights must be one of resnet50, for two layers'): MullerResizer(8, **kwargs)

def test_muller_with_its_authors_weights():
    "Zeros beyond the border, as theirs, and the weights come back"
    torch.manual_seed(0)
    x, m = torch.rand(2, 3, 17, 20), MullerResizer((8, 9), weights='resnet50')
    taps = torch.exp(-torch.arange(-2., 3)**2/2)
    kernel = torch.outer(taps, taps)/taps.sum()**2
    blur = lambda x: F.conv2d(x, kernel.expand(3, 1, 5, 5), padding=2, groups=3)
    down = lambda x: F.interpolate(x, (8, 9), mode='bilinear')
    expected = down(x)+torch.tanh(1.892*down(blur(x)-x)-0.014)+torch.tanh(-11.295*down(blur(blur(x))-blur(x))+0.003)
    torch.testing.assert_close(m(x), expected, atol=1e-5, rtol=0)
    assert resizer_config(m)['weights'] == 'resnet50' and MullerResizer(8, kernel_size=1, weights='resnet50')(x).shape == (2, 3, 8, 8)
