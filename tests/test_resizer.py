"What can go wrong where a resizer makes maps again in its backward pass"
import weakref
import pytest, torch
from contextlib import nullcontext
from copy import deepcopy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from resizer_fastai import resizer
from resizer_fastai.resizer import Resizer, fuse
from resizer_fastai.train import multiply_adds

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
def test_maps_are_freed_with_the_graph(backward):
    r, maps = Resizer(12), []
    conv = r.stem[0].forward
    def first(x):
        y = conv(x)
        maps.append(weakref.ref(y))
        return y
    r.stem[0].forward = first
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

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape,size,args', [((2, 3, 32, 48), (16, 24), {}), ((1, 3, 32, 32), 16, dict(num_kernels=5)), ((2, 3, 33, 31), 16, {}), ((2, 3, 24, 16), (11, 8), dict(interpolate_mode='bicubic')), ((2, 3, 36, 28), (18, 14), dict(inplace=False, num_resblocks=0)),
                                             ((2, 3, 40, 40), 16, dict(antialias=True)), ((2, 3, 48, 48), 16, dict(interpolate_mode='area')), ((2, 3, 32, 32), 16, dict(negative_slope=0.)), ((2, 3, 32, 32), 8, dict(out_channels=12))])
def test_compiled_is_the_plain_one(layout, shape, size, args):
    "In double precision, in which only a mistake is seen"
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Resizer(size, **args, recompute=False).double().to(memory_format=layout)
    for b in plain.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.normal_(b.weight), nn.init.normal_(b.bias), b.running_mean.normal_()
    compiled = Resizer(size, **args).double().to(memory_format=layout)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(fullgraph=True, backend='aot_eager')
    x = (torch.rand(shape, dtype=torch.double)+3).to(memory_format=layout)   # far from zero, where variances are lost first
    for a, b in zip(grads(plain, x), grads(compiled, x), strict=True): torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
    for a, b in zip(plain.buffers(), compiled.buffers(), strict=True): torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)

@pytest.mark.parametrize('at', [(0,0), (128,64), (128,)], ids=['corner','middle','row'])
def test_compiled_measures_what_is_nearly_constant(at):
    torch._dynamo.reset()
    resizer = Resizer(128, negative_slope=1, num_resblocks=0).to(memory_format=torch.channels_last)
    for conv in resizer.stem[0], resizer.stem[2]: nn.init.dirac_(conv.weight), nn.init.zeros_(conv.bias)
    x = torch.full((2,3,256,256), 5.).to(memory_format=torch.channels_last)
    x[0,:,*at] = 1e3
    plain = deepcopy(resizer).double()
    plain(x.double())
    resizer.compile(fullgraph=True, backend='aot_eager')
    assert resizer(x).isfinite().all()
    torch.testing.assert_close(resizer.stem[-1].running_var.double(), plain.stem[-1].running_var, rtol=1e-4, atol=0)

@pytest.mark.skipif(torch.__version__ < '2.15', reason='what PyTorch 2.11 compiles keeps more')
@pytest.mark.parametrize('autocast', [False, True])
def test_compiled_keeps_no_more(autocast):
    torch._dynamo.reset()
    plain, x = Resizer(64).to(memory_format=torch.channels_last), torch.rand(2, 3, 128, 128).to(memory_format=torch.channels_last)
    compiled = deepcopy(plain)
    compiled.compile(fullgraph=True, backend='aot_eager_decomp_partition')   # with the partition into forward and backward that goes with PyTorch's own compiler
    def kept(resizer):
        sizes = {x.data_ptr(): 0}
        def note(t):
            sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y = resizer(x)   # which keeps them alive
        return sum(sizes.values())
    assert kept(compiled) <= 1.05*kept(plain)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('autocast', [False, True])
def test_modules_of_other_precision(dtype, autocast):
    r, x = Resizer(12).to(dtype), torch.rand(2, 3, 24, 24, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = r(x)
    y.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in r.parameters())

weights = ['stem.0.weight', 'stem.4.weight', 'blocks.0.conv1.weight', 'merge.0.weight']   # of which autocast keeps copies
others = ['stem.2.weight', 'stem.2.bias', 'stem.4.bias', 'blocks.0.bn1.bias', 'blocks.1.bn2.bias', 'image']

@pytest.mark.parametrize('what,autocast', [*[(o, False) for o in weights+others], *[(o, True) for o in others]])
def test_what_changes_in_between_is_an_error(what, autocast):
    r, x = Resizer(12), torch.rand(2, 3, 24, 24)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = r(x).float().square().mean()
    with torch.no_grad(): (x if what=='image' else r.get_parameter(what)).mul_(2)
    with pytest.raises(RuntimeError, match='in place|inplace'): y.backward()

@pytest.mark.parametrize('part', ['blocks', 'blocks.0', 'blocks.0.act', 'blocks.1.bn2', 'stem', 'merge.1'])
def test_hooks_are_called_as_ever(part):
    heard = []
    for r in pair():
        m = r.get_submodule(part)
        m.register_forward_pre_hook(lambda m, inp: heard.append('before'))
        m.register_forward_hook(lambda m, inp, out: heard.append('after'))
        grads(r, torch.rand(2, 3, 24, 24))
    assert heard==['before', 'after']*2

@pytest.mark.parametrize('part,other', [('blocks.0.act', nn.SiLU()), ('stem.3', nn.GELU()), ('blocks.0', nn.Identity())])
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

def test_gradients_of_gradients_are_an_error():
    x = torch.rand(2, 3, 24, 24, requires_grad=True)
    for r, error in zip(pair(), (pytest.raises(RuntimeError, match='want a resizer with recompute=False'), nullcontext())):
        with error: torch.autograd.grad(r(x).square().sum(), x, create_graph=True)

def test_parameters_given_for_one_call():
    resizers, x, both = [r.double() for r in pair()], torch.rand(2, 3, 24, 24).double(), []
    given = {k: p.detach()+torch.rand_like(p)/9 for k, p in resizers[0].named_parameters()}
    for r in resizers:
        params = {k: p.clone().requires_grad_() for k, p in given.items()}
        y = functional_call(r, params, x)
        both.append(torch.autograd.grad(y.square().mean(), [*params.values()]))
    for a, b in zip(*both, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

# for inference

@pytest.fixture
def fused(): return fuse(Resizer(12))

@pytest.fixture
def pairs(monkeypatch):
    "Convolutions and activations that were one step"
    if torch.float32 not in resizer._pair_types: pytest.skip('PyTorch without oneDNN')
    done, step = [], resizer._pair
    monkeypatch.setattr(resizer, '_pair', lambda *args: (done.append(args), step(*args))[1])
    return done

def without_gradients(f, *args):
    with torch.no_grad(): return f(*args)

def with_hook(r, x):
    r.stem[0].register_forward_hook(lambda m, inp, out: out+1)
    return r(x)-without_gradients(r, x)

def with_forward_of_its_own(r, x):
    forward = r.stem[0].forward
    r.stem[0].forward = lambda x: forward(x)+1
    return r(x)-without_gradients(r, x)

@pytest.mark.parametrize('f,n', [
    (lambda r, x: r(x)-without_gradients(r, x), 4),
    (with_hook, 3),
    (with_forward_of_its_own, 3),
    (lambda r, x: torch.func.jvp(r, (x,), (x,))[1] - without_gradients(torch.func.jvp, r, (x,), (x,))[1], 0),
    (lambda r, x: torch.func.grad(lambda x: r(x).square().sum())(x) - torch.autograd.grad(r(x).square().sum(), x)[0], 0),
    (lambda r, x: torch.vmap(r)(x[None])[0]-r(x), 0),
    (lambda r, x: torch.tensor(float(multiply_adds(r, x.shape[1:])-multiply_adds(Resizer(12), x.shape[1:]))), 0)],
    ids=['plain', 'hook', 'own forward', 'derivative along', 'torch.func.grad', 'vmap', 'multiply-adds'])
def test_activations_are_one_step_with_their_convolution_only_where_nobody_looks(f, n, fused, pairs):
    off = f(fused, torch.rand(2, 3, 24, 24, requires_grad=True))
    torch.testing.assert_close(off.detach(), torch.zeros_like(off), rtol=0, atol=1e-5)
    assert len(pairs)==n

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_fused_under_autocast(dtype, fused, monkeypatch):
    x = torch.rand(2, 3, 24, 24)
    with torch.autocast('cpu', dtype, enabled=dtype!=torch.float32):
        y = without_gradients(fused, x)
        monkeypatch.setattr(resizer, '_pair_types', [])
        torch.testing.assert_close(y, without_gradients(fused, x), rtol=1e-2, atol=1e-2 if dtype!=torch.float32 else 1e-6)

def test_bias_with_gaps(fused):
    x = torch.rand(2, 3, 24, 24)
    y, bias = without_gradients(fused, x), fused.stem[0].bias
    bias.data = torch.stack([bias.data]*2, dim=1)[:,0]
    torch.testing.assert_close(without_gradients(fused, x), y)

def test_fused_is_compiled_as_one_and_exported_as_plain_layers(fused):
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    for size in (24, 40, 56, 72):
        x = torch.rand(2, 3, size, size)
        torch.testing.assert_close(without_gradients(compiled, x), without_gradients(fused, x), rtol=1e-4, atol=1e-4)
    assert compiler.frame_count==2   # the second is for all sizes
    ops = {str(n.target) for n in without_gradients(torch.export.export, fused, (x,)).graph.nodes}
    assert 'aten.leaky_relu_.default' in ops and not any('mkldnn' in o for o in ops)

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_a_compiler_is_told_of_the_right_layout(mode, layout):
    g = torch.rand(2, 16, 5, 6).to(memory_format=layout)
    torch.library.opcheck(resizer._interpolate_backward, (g, 11, 13, mode))
    torch.library.opcheck(resizer._spread_alone, (g,))

def patched(module, change):
    forward = module.forward
    module.forward = lambda *args: change(forward(*args))

def replace(seq, i, f): seq[i] = f(seq[i])

class MaxPool(resizer.FixedResizer):
    def forward(self, x, size=None): return nn.functional.adaptive_max_pool2d(x, self.size if size is None else size)

@pytest.mark.parametrize('change', [
    lambda r: replace(r.stem, 2, lambda conv: nn.Sequential(conv, nn.Dropout(0.5))), lambda r: replace(r.stem, 2, lambda conv: nn.Sequential(conv, nn.BatchNorm2d(16))),
    lambda r: nn.utils.parametrizations.spectral_norm(r.stem[2]), lambda r: patched(r.blocks[0], lambda y: 3*y), lambda r: patched(r.blocks[1].bn1, lambda y: 3*y),
    lambda r: patched(r.merge, lambda y: 3*y), lambda r: setattr(r.blocks[0].bn2, 'num_batches_tracked', None), lambda r: setattr(r, 'resize', MaxPool(12)), lambda r: patched(r.resize, lambda y: 3*y)],
    ids=['dropout', 'norm', 'spectral', 'block', 'bn', 'merge', 'untracked', 'resize', 'patched resize'])
def test_what_was_changed_is_computed_as_it_is(change):
    torch.manual_seed(0)
    a, b = Resizer(12).double(), Resizer(12, recompute=False).double()
    b.load_state_dict(a.state_dict())
    x, results = torch.rand(2, 3, 24, 24, dtype=torch.double), []
    for r in (a, b):
        torch.manual_seed(1)
        change(r)
        results.append([*grads(r.double(), x), *r.buffers()])
    for y, z in zip(*results, strict=True): torch.testing.assert_close(y, z)

def test_a_hook_on_all_modules_hears_each_once():
    heard = [[], []]
    for r, to in zip(pair(), heard):
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: to.append(type(m).__name__))
        try: grads(r, torch.rand(2, 3, 24, 24))
        finally: handle.remove()
    assert heard[0] == heard[1] and 'BatchNorm2d' in heard[0]

class Tripled(Resizer):
    def forward(self, x, size=None): return 3*super().forward(x, size)

class Block(resizer.ResidualBlock):
    def forward(self, x): return 3*super().forward(x)

@pytest.mark.parametrize('change', [
    lambda r: setattr(r, 'size', (8, 8)), lambda r: setattr(r, 'size', 8), lambda r: setattr(r, 'resize', MaxPool(12)), lambda r: setattr(r, '__class__', Tripled), lambda r: setattr(r.blocks[0], '__class__', Block), lambda r: patched(r.blocks[0], lambda y: 3*y),
    lambda r: r.blocks[0].register_forward_hook(lambda m, x, y: 3*y), lambda r: replace(r.stem, 4, lambda bn: nn.BatchNorm2d(16, track_running_stats=False)),
    lambda r: replace(r.stem, 4, lambda bn: nn.Identity()), lambda r: r.merge.append(nn.LeakyReLU()), lambda r: replace(r.blocks, 0, lambda b: nn.Identity())],
    ids=['size', 'one number', 'resize', 'subclass', 'block', 'patched', 'hook', 'untracked', 'no norm', 'merge', 'identity'])
def test_a_changed_resizer_is_fused_right_or_not_at_all(change):
    r, x = Resizer(12), torch.rand(2, 3, 24, 24)
    nn.init.uniform_(r.stem[4].weight, -1, 1), nn.init.uniform_(r.stem[4].bias)
    r(x)   # other running statistics than at first
    change(r)
    torch.testing.assert_close(fuse(r.eval())(x), r(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('name', ['learned', 'muller', 'bilinear', 'antialias'])
@pytest.mark.parametrize('size', [8, (8, 10)])
def test_another_target_size_may_be_set(name, size):
    r, x = resizer.make_resizer(name, 12), torch.rand(2, 3, 24, 24)
    r.size = size
    for o in (r, r.eval(), resizer.make_resizer(**resizer.resizer_config(r))): assert o(x).shape[-2:] == resizer._check_size(size)

def test_bytes_are_resized():
    x = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    for size in (10, 12): assert (resizer.FixedResizer(size)(x)-resizer.FixedResizer(size)(x.float())).abs().max() <= 1

def test_an_image_of_inference_mode_can_be_trained_on():
    with torch.inference_mode(): x = torch.rand(2, 3, 24, 24)
    with torch.autocast('cpu', torch.bfloat16): same(pair(), x, 2e-2)

def test_export_with_gradients_on():
    "As they are by default, and with any number of images"
    r, x = Resizer(12).eval(), torch.randn(2, 3, 30, 28)
    exported = torch.export.export(r, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    x = torch.randn(5, 3, 30, 28)
    torch.testing.assert_close(exported(x), r(x), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_antialias_in_half_precision(dtype):
    x = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(resizer.FixedResizer(10, antialias=True)(x.to(dtype)), resizer.FixedResizer(10, antialias=True)(x).to(dtype), rtol=2e-2, atol=2e-2)
