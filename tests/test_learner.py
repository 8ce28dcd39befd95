"What crosses modules, files and processes in the joint model and its learner."
import itertools, json, random, re, subprocess, sys
from functools import partial

import numpy as np, pytest, torch
from conftest import needs_timm
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CancelStepException, CategoryBlock, DataBlock, DataLoaders, GrandparentSplitter,
                               ImageBlock, ImageDataLoaders, IntToFloatTensor, MixUp, MultiCategoryBlock, PILImageBW, RandomSplitter, RandTransform,
                               ReduceLROnPlateau, RegressionBlock, Resize, TensorImage, TransformBlock, accuracy, aug_transforms, image2tensor,
                               load_learner, nn, no_random, parent_label, resnet18, set_seed)
from PIL import Image
from torch.utils.data import DataLoader as TorchLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor as ToTorch
from resizer_fastai.data import ReadImage, get_dls, get_path, image_files, resizer_block
from resizer_fastai.learner import (Autocast, FiniteLoss, RecalibrateBN, ResizerClassifier, ResizerLearner, ResizerLR, bodies, plain_head,
                                    resizer_learner)
from resizer_fastai.resizer import FixedResizer, Resizer, resizers


small = dict(size=32, pretrained=False, **plain_head)

@pytest.fixture(scope='module')
def dls(): return get_dls('sample', size=64, bs=8, limit=16, num_workers=0)

@pytest.fixture
def learn(dls, tmp_path):
    set_seed(0)
    return resizer_learner(dls, resnet18, path=tmp_path, metrics=accuracy, **small)

@pytest.fixture
def body(monkeypatch):
    "A body that claims to be pretrained and downloads nothing"
    def fake_resnet(pretrained=True): return resnet18()
    monkeypatch.setitem(bodies, 'fake', fake_resnet)
    return 'fake'

def fit(learn, n=1, lr=1e-3, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)

def test_resizer_learner_takes_fastai_verbs(learn, tmp_path):
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=12, show_plot=False)
        learn.fine_tune(1, cbs=MixUp())
        preds, _ = learn.get_preds()
        assert learn.tta(n=1)[0].shape == preds.shape
        learn.save('both'), learn.load('both')
        fit(learn)
        preds, _ = learn.get_preds()
        learn.export('whole.pkl')
        again = load_learner(tmp_path/'whole.pkl')
        test_dl = again.dls.test_dl(learn.dls.valid_ds.items, num_workers=0)
        torch.testing.assert_close(again.get_preds(dl=test_dl)[0], preds)

def test_resizer_learner_writes_beside_its_path(dls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = resizer_learner(dls, resnet18, **small)
    learn.save('here')
    assert (tmp_path/'models'/'here.pth').exists()

@pytest.mark.parametrize('arch', ['xresnet18', 'convnext_tiny', pytest.param('timm/resnet18', marks=needs_timm),
                                  pytest.param('timm/swin_tiny_patch4_window7_224', marks=needs_timm)])
def test_bodies_train_and_come_back(arch, tmp_path):
    "timm's Swin has features of shape (B, H, W, C)"
    size = 224 if 'swin' in arch else 32
    model = ResizerClassifier(arch, 10, 'bilinear', size=size, input_size=64)
    x = torch.rand(2, 3, 64, 64)
    model(x).sum().backward()
    model.save_pretrained(tmp_path)
    with torch.no_grad(): torch.testing.assert_close(ResizerClassifier.from_pretrained(tmp_path)(x), model.eval()(x))

def test_pretrained_body_freezes_and_slows_the_resizer(dls, body, tmp_path):
    learn = resizer_learner(dls, body, size=32, path=tmp_path)
    assert [cb.mult for cb in learn.cbs if isinstance(cb, ResizerLR)] == [0.01]
    assert learn.resizer.zero_init and learn.opt.frozen_idx > 0
    trains = {k: any(p.requires_grad for p in m.parameters() if p.ndim > 1) for k, m in learn.model.named_children()}
    assert trains == dict(resizer=True, body=False, head=True)
    assert not [cb for cb in resizer_learner(dls, body, 'muller', size=32).cbs if isinstance(cb, ResizerLR)]
    assert not [cb for cb in resizer_learner(dls, body, size=32, lr_mult=1).cbs if isinstance(cb, ResizerLR)]

def test_class_of_ones_own_carries_its_lr_mult(dls, body, monkeypatch):
    class Slow(FixedResizer): lr_mult = 0.5
    monkeypatch.setitem(resizers, 'slow', Slow)
    assert [cb.mult for cb in resizer_learner(dls, body, 'slow', size=32).cbs if isinstance(cb, ResizerLR)] == [0.5]

def test_partial_in_resizers_keeps_what_it_fixes(dls, monkeypatch):
    monkeypatch.setitem(resizers, 'grey', partial(Resizer, out_channels=1, num_kernels=4))
    model = resizer_learner(dls, resnet18, 'grey', **small).model
    assert model.resizer.out_channels == 1 and model.body[0].in_channels == 1

# How images are read

def upside_down(root):
    "Photographs whose camera was upside down, in two classes"
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x112] = 3
    for split in ('train', 'valid'):
        for c in ('dark', 'light'):
            (root/split/c).mkdir(parents=True)
            for i in range(4):
                x = rng.integers(0, 120, (40, 40, 3)).astype(np.uint8) + 120*(c == 'light')
                Image.fromarray(x.astype(np.uint8)).save(root/split/c/f'{i}.jpg', exif=exif)
    return root

def readers(root):
    block = resizer_block(size=32, min_scale=1)
    yield True, block.dataloaders(root, bs=4, num_workers=0)
    yield False, block.new(item_tfms=lambda x: x.flip(-1)).dataloaders(root, bs=4, num_workers=0)
    yield False, ImageDataLoaders.from_folder(root, item_tfms=Resize(32), bs=4, num_workers=0)
    yield True, block.new(batch_tfms=aug_transforms()).dataloaders(root, bs=4, num_workers=0)

class Mirrored(ReadImage):
    def encodes(self, o): return super().encodes(o).flip(-1)

class Darker(RandTransform):
    "In validation, too, as the wrapper of Albumentations in fastai's documentation"
    split_idx = None
    def encodes(self, x: TensorImage): return x/2

def crop(file): return Image.open(file).crop((0, 0, 20, 20))

others = dict(subclass=dict(type_tfms=[Mirrored(32)]), after=dict(type_tfms=[ReadImage(32), lambda x: 255-x]), scale=dict(batch_tfms=IntToFloatTensor(div=127)),
              augmentation=dict(batch_tfms=[IntToFloatTensor, Darker(p=1.)]))

@pytest.mark.parametrize('name', [*others, 'get_x'])
def test_images_that_are_changed_in_validation_are_not_read_by_the_model(name, tmp_path):
    root, split = upside_down(tmp_path), GrandparentSplitter('train', 'valid')
    images = TransformBlock(**dict(type_tfms=[ReadImage(32)], batch_tfms=IntToFloatTensor) | others.get(name, {}))
    for get_x, knows in ((None, False),) if name != 'get_x' else ((crop, False), (lambda file: str(file), True)):
        block = DataBlock((images, CategoryBlock), get_items=image_files, get_x=get_x, get_y=parent_label, splitter=split)
        dls = block.dataloaders(root, bs=4, num_workers=0)
        assert (resizer_learner(dls, resnet18, **small).model.read is not None) == knows

def test_model_reads_images_only_if_its_loaders_read_through_read_image(tmp_path):
    root = upside_down(tmp_path/'data')
    for knows, dls in readers(root):
        learn = resizer_learner(dls, resnet18, size=16, pretrained=False, path=tmp_path)
        fit(learn)
        learn.save_pretrained(tmp_path/'model')
        model, files = ResizerClassifier.from_pretrained(tmp_path/'model'), list(dls.valid_ds.items)
        with learn.no_bar(): preds, _ = learn.get_preds()
        if knows: torch.testing.assert_close(model.predict(files)[2], preds, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(ValueError, match='does not know how its images are read'): model.predict(files)
        batch = torch.cat([b[0].cpu() for b in dls.valid])
        torch.testing.assert_close(model.predict(batch, bs=3)[2], preds, rtol=1e-4, atol=1e-4)

def test_reader_that_the_user_decides_on_is_saved(tmp_path):
    model = ResizerClassifier('resnet18', 3, size=16, input_size=32)
    model.read = ReadImage(40, 'pad', 'white')
    model.save_pretrained(tmp_path)
    read = ResizerClassifier.from_pretrained(tmp_path).read
    assert (read.size, read.resize, tuple(read.background)) == ([40, 40], 'pad', (255, 255, 255))

def test_loaders_of_pytorch(tmp_path):
    root = upside_down(tmp_path/'data')
    loader = TorchLoader(ImageFolder(root/'train', ToTorch()), 4)
    learn = resizer_learner(DataLoaders(loader, loader), resnet18, n_out=2, loss_func=nn.CrossEntropyLoss(), path=tmp_path,
                            cbs=RecalibrateBN(1), **small)
    fit(learn)
    assert learn.model.read is None and learn.model.activation == 'softmax' and learn.model.input_size == [40, 40]

def test_other_loaders_have_the_same_classes_in_the_same_order(learn, tmp_path):
    files = image_files(get_path('sample'))[::30]
    backwards = DataBlock((ImageBlock, CategoryBlock(vocab=learn.dls.vocab[::-1], sort=False)), get_y=parent_label, item_tfms=Resize(48))
    with pytest.raises(ValueError, match='in the same order'): learn.dls = backwards.dataloaders(files, bs=4)
    assert learn.model.vocab == list(learn.dls.vocab)

def test_other_loaders_have_the_same_channels(learn):
    grey = DataBlock((ImageBlock(PILImageBW), CategoryBlock(vocab=learn.dls.vocab)), get_y=parent_label, item_tfms=Resize(64))
    with pytest.raises(ValueError, match='have 1 channel, and the model 3'): learn.dls = grey.dataloaders(image_files(get_path('sample'))[::30], bs=4)

# What outputs mean

def labelled(block, get_y):
    files = image_files(get_path('sample'))[::30]
    return DataBlock((ImageBlock, block), get_y=get_y, splitter=RandomSplitter(seed=0), item_tfms=Resize(32)).dataloaders(files, bs=4)

outputs = dict(
    several=(MultiCategoryBlock, lambda f: [f.parent.name], nn.BCEWithLogitsLoss(), 'sigmoid'),
    several_by_fastai=(MultiCategoryBlock, lambda f: [f.parent.name], None, 'sigmoid'),
    value=(RegressionBlock, lambda f: float(f.stem), None, 'none'),
    probabilities=(MultiCategoryBlock, lambda f: [f.parent.name], nn.BCELoss(), 'none'),
    one_output=(RegressionBlock, lambda f: float(int(f.stem) % 2), BCEWithLogitsLossFlat(), 'sigmoid'),
    weighted=(CategoryBlock, parent_label, nn.CrossEntropyLoss(weight=torch.ones(10)), 'softmax'))

@pytest.mark.parametrize('block,get_y,loss,activation', outputs.values(), ids=outputs)
def test_predict_obeys_the_loss_and_the_target_block(block, get_y, loss, activation, tmp_path):
    dls = labelled(block, get_y)
    learn = resizer_learner(dls, resnet18, loss_func=loss, path=tmp_path, **small)
    learn.save_pretrained(tmp_path)
    model, x = ResizerClassifier.from_pretrained(tmp_path), dls.valid.one_batch()[0].cpu()
    with torch.no_grad(): logits = model(x)
    want = dict(sigmoid=logits.sigmoid(), softmax=logits.softmax(1), none=logits)[activation]
    torch.testing.assert_close(model.predict(x)[2], want)

def test_several_targets_have_no_vocab(tmp_path):
    block = DataBlock((ImageBlock, CategoryBlock, CategoryBlock), n_inp=1, get_y=[parent_label, lambda f: int(f.stem) % 2], item_tfms=Resize(32))
    dls = block.dataloaders(image_files(get_path('sample'))[::30], bs=4)
    learn = resizer_learner(dls, resnet18, n_out=12, loss_func=lambda x, a, b: x.square().mean(), **small)
    fit(learn)
    assert learn.model.vocab is None and learn.model.activation == 'none'

# What a user of `vision_learner` does

def test_saved_model_goes_on_training_where_it_was(learn, dls, tmp_path):
    "In a learner of its own, whose loaders do not normalise yet"
    fit(learn)
    learn.save_pretrained(tmp_path)
    fresh = get_dls('sample', size=64, bs=8, limit=16, num_workers=0)
    again = ResizerLearner(fresh, ResizerClassifier.from_pretrained(tmp_path), path=tmp_path)
    with learn.no_bar(), again.no_bar(): torch.testing.assert_close(again.get_preds()[0], learn.get_preds()[0])
    fit(again)

def test_export_changes_nothing_and_needs_no_images(tmp_path):
    root = upside_down(tmp_path/'data')
    learn = resizer_learner(resizer_block(32, min_scale=1).dataloaders(root, bs=4, num_workers=0), resnet18, path=tmp_path, **small)
    learn.model.read = read = ReadImage(40)
    root.rename(tmp_path/'moved')
    learn.export()
    assert learn.model.read is read and len(learn.dls.train_ds) == 8

def test_statistics_of_model_and_loaders_agree(tmp_path):
    files = list(image_files(get_path('sample'))[::30])
    for kwargs, want in ((dict(stats=([0.5], [0.25])), 0.25), (dict(stats=([0.5]*3, [0.25]*3), normalize=False), 1)):
        images = TransformBlock(type_tfms=ReadImage(32), batch_tfms=IntToFloatTensor)
        block = DataBlock((images, CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=0))
        dls = block.dataloaders(files, bs=4, num_workers=0)
        learn = resizer_learner(dls, resnet18, path=tmp_path, **small | kwargs)
        assert {*learn.model.std.flatten().tolist()} == {want}
        with learn.no_bar(): preds, _ = learn.get_preds()
        torch.testing.assert_close(learn.model.predict(dls.valid_ds.items)[2], preds, rtol=1e-4, atol=1e-4)

def test_reduce_lr_on_plateau(learn):
    fit(learn, 2, 0.01, cbs=ReduceLROnPlateau('valid_loss', patience=0, min_delta=100))
    assert [h['lr'] for h in learn.opt.hypers] == [pytest.approx(1e-3)]*len(learn.opt.param_lists)

def test_resizer_lr_passes_over_a_cancelled_step(dls, tmp_path):
    class Cancel(Callback):
        order = ResizerLR.order-1
        def before_step(self): raise CancelStepException
    learn = resizer_learner(dls, resnet18, path=tmp_path, lr_mult=0.1, cbs=Cancel(), **small)
    before = [p.clone() for p in learn.resizer.parameters()]
    fit(learn)
    for a, b in zip(before, learn.resizer.parameters()): assert torch.equal(a, b)

def test_model_is_exported_by_torch():
    model, x = ResizerClassifier('resnet18', 3, size=16, input_size=32).eval(), torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

# What is saved

changes = dict(another=lambda m: setattr(m, 'resizer', Resizer(24, num_resblocks=1)), antialias=lambda m: setattr(m.resizer, 'antialias', True),
               size=lambda m: setattr(m.resizer, 'size', (np.int64(24), 20)), vocab=lambda m: setattr(m, 'vocab', ['x', 'y', 'z']))

@pytest.mark.parametrize('change', changes.values(), ids=changes)
def test_save_pretrained_writes_what_the_model_is_now(change, tmp_path):
    model, x = ResizerClassifier('resnet18', 3, 'bilinear', size=16, input_size=48, vocab=list('abc')), torch.rand(2, 3, 48, 48)
    change(model)
    model.save_pretrained(tmp_path)
    again = ResizerClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again.predict(x)[2], model.predict(x)[2])
    assert again.vocab == model.vocab

own = '''
from torch import nn
from resizer_fastai.all import *
class Mine(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
    def forward(self, x): return interpolate(x, self.size)
'''

@pytest.mark.slow
def test_resizer_of_ones_own_comes_back_only_where_it_is_registered(tmp_path):
    def python(code): return subprocess.run([sys.executable, '-W', 'ignore', '-c', own+code], cwd=tmp_path, capture_output=True, text=True)
    saved = python("resizers['mine'] = Mine; ResizerClassifier('resnet18', 3, 'mine', size=8, input_size=16).save_pretrained('m')")
    assert saved.returncode == 0, saved.stderr
    assert python("resizers['mine'] = Mine; assert type(ResizerClassifier.from_pretrained('m').resizer) is Mine").returncode == 0
    refused = python("ResizerClassifier.from_pretrained('m')")
    assert "no resizer 'mine'" in refused.stderr and 'register yours first' in refused.stderr

def config(**changes): return lambda d: (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | changes))

broken = dict(truncated=lambda d: (d/'model.safetensors').write_bytes((d/'model.safetensors').read_bytes()[:-50]),
              no_json=lambda d: (d/'config.json').write_text('{'), no_dict=lambda d: (d/'config.json').write_text('[]'),
              other_shape=config(n_out=4), no_stats=config(std=[0, 1, 1]), few_stats=config(mean=[0.5, 0.5]), few_names=config(vocab=['a', 'b']),
              activation=config(activation='relu'))

@pytest.mark.parametrize('name', broken)
def test_from_pretrained_names_the_file_that_does_not_fit(name, tmp_path):
    ResizerClassifier('resnet18', 3, 'bilinear', size=16, input_size=32).save_pretrained(tmp_path)
    broken[name](tmp_path)
    file = tmp_path/('model.safetensors' if name in ('truncated', 'other_shape') else 'config.json')
    with pytest.raises(ValueError, match=f'{file} cannot be used here'): ResizerClassifier.from_pretrained(tmp_path)

def test_stats_of_a_loaded_model_can_be_changed_and_are_saved(tmp_path):
    model = ResizerClassifier('resnet18', 3, 'bilinear', size=16, input_size=32)
    model.set_stats([0.5]*3, [0.25]*3)
    model.save_pretrained(tmp_path)
    again = ResizerClassifier.from_pretrained(tmp_path)
    assert torch.equal(again.std, model.std) and again.mean.flatten().tolist() == [0.5]*3

def test_resizer_learner_asks_for_n_in(tmp_path):
    "Grey images, and images with transparency"
    files = [f for f in image_files(get_path('sample')) if f.parent.name in ('grain-27', 'grain-45')][:40]
    for mode, n in (('L', 1), ('RGBA', 4)):
        def read(file, mode=mode): return Image.open(file).convert(mode)
        block = DataBlock((TransformBlock(type_tfms=[read, lambda im: TensorImage(image2tensor(im))], batch_tfms=IntToFloatTensor), CategoryBlock),
                          get_y=parent_label, splitter=RandomSplitter(seed=0))
        dls = block.dataloaders(files, bs=4, num_workers=0)
        with pytest.raises(ValueError, match=f'pass n_in={n}'): resizer_learner(dls, 'resnet18', size=16, pretrained=False)
        assert resizer_learner(dls, 'resnet18', size=16, pretrained=False, n_in=n).model.resizer.stem[0].in_channels == n

@pytest.mark.parametrize('kwargs', [dict(precision='bf16'), dict(pretraned=False)], ids=str)
def test_resizer_learner_answers_for_its_own_keywords(learn, kwargs):
    with pytest.raises(TypeError, match=re.escape('resizer_learner() got an unexpected keyword argument')): resizer_learner(learn.dls, 'resnet18', **kwargs)

# Callbacks

@pytest.mark.slow
def test_autocast_scales_gradients_and_skips_steps(learn, monkeypatch):
    "As with float16, whose convolutions are slow on a CPU: the scale starts far too large, and no step changes the weights"
    monkeypatch.setattr(Autocast, 'context', lambda self: torch.autocast('cpu', torch.bfloat16))
    before = [p.clone() for p in learn.model.parameters()]
    fit(learn, cbs=[Autocast(torch.float16, init_scale=2.**127)])
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))

def test_autocast_is_off_after_an_interrupted_batch(learn):
    def interrupt(*args): raise KeyboardInterrupt
    learn.add_cb(Autocast())
    learn.model.body[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert not torch.is_autocast_enabled('cpu')

def test_recalibrate_bn_measures_trained_norms_only(dls, learn):
    learn.add_cb(RecalibrateBN(2))
    frozen, stem, means = learn.model.body[1].eval(), learn.resizer.stem[-1], []
    frozen.train = lambda mode=True: frozen
    before = frozen.running_mean.clone()
    fit(learn)
    assert torch.equal(frozen.running_mean, before) and stem.momentum == 0.1
    measured = stem.running_mean.clone()
    stem.register_forward_pre_hook(lambda m, inp: means.append(inp[0].mean((0, 2, 3))))
    with torch.no_grad(), no_random():
        for x, _ in itertools.islice(dls.train.new(), 2): learn.model.train()(x)
    torch.testing.assert_close(measured, torch.stack(means).mean(0), rtol=1e-3, atol=1e-5)

def test_finite_loss_lets_lr_find_end(learn):
    "Where a fit would raise FloatingPointError; the weights are as before"
    learn.add_cb(FiniteLoss())
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.lr_find(1e3, 1e9, num_it=4, show_plot=False, stop_div=False, suggest_funcs=None)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))

@pytest.mark.slow
def test_compiled_learner_trains_as_the_eager_one(dls, tmp_path):
    def weights(compile):
        set_seed(0)
        learn = resizer_learner(dls, resnet18, path=tmp_path, cbs=[RecalibrateBN(1), Autocast()], **small)
        if compile: learn.model.compile(backend='eager', fullgraph=True)
        set_seed(0)
        dls.train.rng = random.Random(0)
        fit(learn)
        return nn.utils.parameters_to_vector(learn.model.parameters())
    torch.testing.assert_close(weights(True), weights(False))
