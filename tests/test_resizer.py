"What can go wrong where a resizer makes maps again in its backward pass"
import weakref
import pytest, torch
from copy import deepcopy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from resizer_fastai import resizer
from resizer_fastai.resizer import Resizer, fuse

def pair(**kwargs):
    "A resizer that makes maps again, and one with the same weights that keeps them all"
    torch.manual_seed(0)
    a = Resizer(12, **kwargs)
    b = Resizer(12, **kwargs, recompute=False)
    b.load_state_dict(a.state_dict())
    return a, b

def grads(resizer, x): return torch.autograd.grad(resizer(x).float().square().mean(), [*resizer.parameters()])

def same(resizers, x, tol=1e-5):
    for a, b in zip(*[grads(r, x) for r in resizers], strict=True): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

@pytest.mark.parametrize('backward', ['none', 'retained', 'of one weight'])
def test_maps_are_freed_with_the_graph(backward, monkeypatch):
    r, maps, conv = Resizer(12), [], resizer._conv_leaky
    def noted(*args):
        y = conv(*args)
        maps.append(weakref.ref(y))
        return y
    monkeypatch.setattr(resizer, '_conv_leaky', noted)
    y = r(torch.rand(2, 3, 24, 24)).sum()
    if backward=='retained': y.backward(retain_graph=True)
    if backward=='of one weight': torch.autograd.grad(y, r.out.weight)
    assert maps[0]() is not None
    del y
    assert maps[0]() is None

def test_images_of_fastai():
    fastai = pytest.importorskip('fastai.torch_core')
    same(pair(), fastai.TensorImage(torch.rand(2, 3, 24, 24)))

symbolic = pytest.param(True, marks=pytest.mark.skipif(torch.__version__ < '2.15', reason='PyTorch 2.11 cannot make the floats of a BatchNorm symbolic'))

@pytest.mark.parametrize('dynamic', [symbolic, None])
def test_compiled_twice_for_all_sizes(dynamic):
    "The first is exactly twice the target; the graph of the second serves all others"
    torch._dynamo.reset()
    r, compiled, compiler, graphs = Resizer(12), Resizer(12), CompileCounterWithBackend('aot_eager'), []
    compiled.load_state_dict(r.state_dict())
    compiled.compile(fullgraph=True, dynamic=dynamic, backend=compiler)
    for size in (24, 40, 56, 72):
        x = torch.rand(2, 3, size, size)
        for a, b in zip(grads(r, x), grads(compiled, x), strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        graphs.append(compiler.frame_count)
    assert 0 < graphs[0] < graphs[1] == graphs[2] == graphs[3]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('autocast', [False, True])
def test_modules_of_other_precision(dtype, autocast):
    r, x = Resizer(12).to(dtype), torch.rand(2, 3, 24, 24, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = r(x)
    y.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in r.parameters())

weights = ['stem.0.weight', 'stem.2.weight', 'stem.4.weight', 'blocks.0.conv1.weight', 'merge.0.weight']   # of which autocast keeps copies
others = ['stem.4.bias', 'blocks.0.bn1.bias', 'blocks.1.bn2.bias', 'image']

@pytest.mark.parametrize('what,autocast', [*[(o, False) for o in weights+others], *[(o, True) for o in others]])
def test_what_changes_in_between_is_an_error(what, autocast):
    r, x = Resizer(12), torch.rand(2, 3, 24, 24)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = r(x).float().square().mean()
    with torch.no_grad(): (x if what=='image' else r.get_parameter(what)).mul_(2)
    with pytest.raises(RuntimeError, match='in place|inplace'): y.backward()

@pytest.mark.parametrize('part', ['blocks', 'blocks.0', 'blocks.0.act', 'blocks.1.bn2', 'stem', 'stem.0', 'stem.1', 'merge.1'])
def test_hooks_are_called_as_ever(part):
    heard = []
    for r in pair():
        m = r.get_submodule(part)
        m.register_forward_pre_hook(lambda m, inp: heard.append('before'))
        m.register_forward_hook(lambda m, inp, out: heard.append('after'))
        grads(r, torch.rand(2, 3, 24, 24))
    assert heard==['before', 'after']*2

@pytest.mark.parametrize('part,other', [('blocks.0.act', nn.SiLU()), ('stem.3', nn.GELU()), ('blocks.0', nn.Identity()),
                                        ('stem.0', nn.Conv2d(3, 16, 7, padding=3, padding_mode='reflect')), ('stem.0', nn.Conv2d(3, 16, 7, padding='same'))])
def test_other_layers_are_not_made_again(part, other):
    resizers = pair()
    for r in resizers: r.set_submodule(part, deepcopy(other))
    same(resizers, torch.rand(2, 3, 24, 24))

@pytest.mark.parametrize('slope', [0., 0.2])
def test_slopes_and_parts_that_stand_still(slope):
    resizers = pair(negative_slope=slope)
    same(resizers, torch.rand(2, 3, 24, 24))
    for r in resizers: r.blocks[0].bn1.eval()
    same(resizers, torch.rand(2, 3, 24, 24))

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch without oneDNN')
@pytest.mark.parametrize('there', [True, False])
def test_with_and_without_activations_in_convolutions(there, monkeypatch):
    "Fused for inference and in training; the same where oneDNN has no such convolution"
    r, kept = pair()
    x, alone, leaky = torch.rand(2, 3, 24, 24), [], nn.functional.leaky_relu
    monkeypatch.setattr(nn.functional, 'leaky_relu', lambda *args: (alone.append(args), leaky(*args))[1])
    if not there: monkeypatch.setattr(resizer, '_has_conv_leaky', lambda dtype: False)
    grads(r, x)
    fuse(r)(x)
    assert len(alone)==(4 if there else 4+7)   # two blocks, once more for the backward pass; the stem, and once more its second convolution, and all four of the fused one
    same((r, kept), x)
    torch.testing.assert_close(fuse(r)(x), r.eval()(x), rtol=1e-4, atol=1e-4)

def test_fused_is_compiled_as_one_and_exported_as_plain_layers():
    torch._dynamo.reset()
    fused, compiler = fuse(Resizer(12)), CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for size in (24, 40, 56, 72):
            x = torch.rand(2, 3, size, size)
            torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-4)
    assert compiler.frame_count==2   # the second is for all sizes
    ops = {str(n.target) for n in torch.export.export(fused, (x,)).graph.nodes}
    assert 'aten.leaky_relu_.default' in ops and not any('mkldnn' in o for o in ops)
