"Bodies of every kind behind a resizer, without downloads."
import sys, urllib.error
import pytest, torch
from fastai.vision.all import Normalize, ProgressCallback, noop, params
from torchvision.models import ViT_B_32_Weights, VisionTransformer, googlenet
from resizer_fastai.data import UsageError, get_dls
from resizer_fastai.learner import Autocast, ResizerClassifier, ResizerLR, body_stats, get_body, make_body, resizer_learner
from resizer_fastai.train import multiply_adds

def vit(pretrained=False): return VisionTransformer(224, 32, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64)

def new_dls(): return get_dls('sample', size=64, bs=5, limit=10, num_workers=0, device='cpu')

def make(arch, tmp_path, **kwargs):
    learn = resizer_learner(new_dls(), arch, **dict(size=32, pretrained=False, path=tmp_path) | kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def moved(learn):
    "Parts of whose matrices and filters every one changes in an epoch, and those of which none does"
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters() if p.ndim > 1}
    learn.fit(1, 1e-2)
    after = dict(learn.model.named_parameters())
    changed = {part: {not torch.equal(v, after[k]) for k, v in before.items() if k.startswith(part)} for part in ('resizer', 'body', 'head')}
    return {k for k, v in changed.items() if v == {True}}, {k for k, v in changed.items() if v == {False}}

@pytest.mark.parametrize('arch,size,features', [('resnet18', 32, 512), ('xresnet18', 32, 512), ('convnext_tiny', 32, 768), ('efficientnet_b0', 32, 1280),
    ('shufflenet_v2_x0_5', 32, 1024), ('mobilenet_v2', 32, 1280), (vit, 224, 32), ('timm/resnet18', 32, 512), ('timm/convnext_atto', 32, 320),
    ('timm/vit_tiny_patch16_224', 224, 192)], ids=lambda o: getattr(o, '__name__', str(o)))
def test_a_body_of_each_kind(arch, size, features, tmp_path):
    "It trains with the resizer, stands still when frozen, and comes back from files."
    if str(arch).startswith('timm/'): pytest.importorskip('timm')
    learn = make(arch, tmp_path, size=size)
    assert learn.model.body(torch.rand(2, 3, size, size)).shape[1] == features
    assert moved(learn)[0] == {'resizer', 'body', 'head'}
    learn.freeze()
    assert moved(learn) == ({'resizer', 'head'}, {'body'})
    if callable(arch): return
    learn.save_pretrained(tmp_path/'m')
    again = ResizerClassifier.from_pretrained(tmp_path/'m').predict(list(learn.dls.valid_ds.items))[2]
    torch.testing.assert_close(again, learn.get_preds()[0], atol=1e-4, rtol=0)

@pytest.mark.parametrize('arch', [vit, 'timm/vit_tiny_patch16_224'], ids=lambda o: getattr(o, '__name__', str(o)))
def test_a_body_of_one_size_says_so(arch, tmp_path):
    "Before anything is trained, in one sentence."
    if arch is not vit: pytest.importorskip('timm')
    with pytest.raises(UsageError, match='cannot take images of 3x32x32, which the resizer puts out.*224'): make(arch, tmp_path)
    with pytest.raises(UsageError, match='cannot take images of 3x64x64'): make(arch, tmp_path, resizer='none', size=224)

@pytest.mark.parametrize('arch', ['googlenet', 'inception_v3', 'maxvit_t'])
def test_a_body_that_cannot_be_cut_says_so(arch):
    with torch.device('meta'), pytest.raises(UsageError, match=f'{arch} cannot be cut into a body and a head.*pass cut'): make_body(arch)

def test_weights_without_auxiliary_heads_are_no_way_round(monkeypatch):
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: googlenet(init_weights=False).state_dict())
    with pytest.raises(UsageError, match='googlenet cannot be cut.*no auxiliary heads'): make_body('googlenet', pretrained=True)

def test_a_body_with_channels_last_in_its_features():
    "Swin of timm puts out (B, H, W, C); here it is (B, C, H, W), as a head wants it."
    pytest.importorskip('timm')
    body, features, pool = make_body('timm/swin_tiny_patch4_window7_224')
    assert pool and body(torch.rand(1, 3, 224, 224)).shape == (1, features, 7, 7)

def test_attention_is_counted():
    "As torchvision counts it"
    assert multiply_adds(get_body('vit_b_32')(), (3, 224, 224))/1e9 == pytest.approx(ViT_B_32_Weights.DEFAULT.meta['_ops'], rel=0.01)

@pytest.mark.parametrize('arch', ['xresnet18', 'xresnet101', 'xresnet50_deep'])
def test_there_are_weights_of_one_xresnet_only(arch):
    "fastai would load what fits of xresnet50's, and leave the rest random"
    with pytest.raises(UsageError, match=f'no pretrained weights of {arch}'): make_body(arch, pretrained=True)

@pytest.mark.parametrize('arch,mean', [('resnet18', 0.485), ('efficientnet_v2_l', 0.5), ('timm/resnet18', 0.485), ('timm/vit_tiny_patch16_224', 0.5)])
def test_statistics_belong_to_the_weights(arch, mean):
    if arch.startswith('timm/'): pytest.importorskip('timm')
    assert body_stats(arch)[0][0] == mean

@pytest.mark.parametrize('pretrained,mean', [(True, 0.5), (False, 0.485)])
def test_images_are_normalised_for_pretrained_weights(pretrained, mean, tmp_path, monkeypatch):
    "With what timm says of them, which fastai does not know; from random weights with ImageNet's."
    timm = pytest.importorskip('timm')
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **kwargs: create(name, pretrained=False, **kwargs))
    learn = make('timm/mixer_s32_224', tmp_path, size=224, pretrained=pretrained)
    norm, = learn.dls.after_batch.fs.filter(lambda o: isinstance(o, Normalize))
    assert norm.mean.flatten().tolist() == pytest.approx(learn.model.mean.flatten().tolist())
    assert norm.mean.flatten()[0].item() == pytest.approx(mean)
    assert params(learn.resizer)[-2].abs().max().item() == 0 or not pretrained   # zero_init where pretrained
    assert learn.opt is None or learn.opt.frozen_idx == (1 if pretrained else 0)
    assert [cb.mult for cb in learn.cbs if isinstance(cb, ResizerLR)] == ([0.01] if pretrained else [])

def test_other_statistics_than_the_weights_want_are_noticed(tmp_path, monkeypatch):
    "DataLoaders that normalise already keep their statistics, and a warning says what was wanted."
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: get_body('resnet18')().state_dict())
    dls = new_dls()
    dls.add_tfms([Normalize.from_stats([0.5]*3, [0.5]*3, cuda=False)], 'after_batch')
    with pytest.warns(UserWarning, match='for the weights of resnet18 it should be .*mean.*0.485'): resizer_learner(dls, 'resnet18', size=32, path=tmp_path)

@pytest.mark.parametrize('kwargs,mults', [({}, [0.01]), (dict(lr_mult=0.5), [0.5]), (dict(lr_mult=1), []), (dict(resizer='muller'), []), (dict(resizer='bilinear'), [])], ids=str)
def test_rate_of_the_resizer_in_front_of_pretrained_weights(kwargs, mults, tmp_path, monkeypatch):
    "A hundredth for a learned one unless told otherwise; four parameters or none have the head's."
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: get_body('resnet18')().state_dict())
    learn = make('resnet18', tmp_path, pretrained=True, cut=5, **kwargs)
    assert [cb.mult for cb in learn.cbs if isinstance(cb, ResizerLR)] == mults

@pytest.mark.parametrize('where,arch', [('torchvision.models._api.load_state_dict_from_url', 'resnet18'), ('timm.create_model', 'timm/resnet18'),
                                        ('fastai.vision.models.xresnet.load_state_dict_from_url', 'xresnet50')])
def test_no_weights_to_be_had(where, arch, tmp_path, monkeypatch):
    "One sentence says so and names the way out."
    if arch.startswith('timm/'): pytest.importorskip('timm')
    def unreachable(*args, **kwargs): raise urllib.error.URLError('Name or service not known')
    monkeypatch.setattr(where, unreachable)
    with pytest.raises(OSError, match=f'the pretrained weights of {arch} are neither on this machine nor to be downloaded .*: train from random weights'):
        make(arch, tmp_path, pretrained=True)

def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UsageError, match='pip install timm'): get_body('timm/resnet18')

@pytest.mark.parametrize('arch', ['timm/resnet5', 'timm/resnet18.no_such_tag', 'os.system', 'timm.create_model'])
def test_unknown_names(arch):
    "Names are looked up in lists and never imported; what is near is named."
    if arch.startswith('timm/'): pytest.importorskip('timm')
    with pytest.raises(UsageError, match='no body .*such as'): get_body(arch)

def test_cut_is_not_for_timm():
    pytest.importorskip('timm')
    with pytest.raises(UsageError, match='comes cut'): make_body('timm/resnet18', cut=-2)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=lambda o: getattr(o, '__name__', str(o)))
def test_half_precision_trains(dtype, tmp_path):
    "Gradients are scaled for float16 and come out as they were; the weights that move are float32."
    learn = make('resnet18', tmp_path, cut=5, cbs=Autocast(dtype, init_scale=1024.))
    before = learn.model.resizer.out.weight.detach().clone()
    learn.fit(1, 1e-2)
    after = learn.model.resizer.out.weight.detach()
    assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(after, before)
    assert 1e-4 < (after-before).abs().max() < 0.1
