"What fastai's users do with the learner of `vision_learner`, done with that of `resizer_learner`."
import json, pickle, random, re, shutil, sys, warnings
from copy import deepcopy
from functools import partial
from types import ModuleType
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.all import (Adam, BCEWithLogitsLossFlat, Callback, CancelEpochException, CancelFitException, CancelStepException, CancelValidException, CategoryBlock, ClassificationInterpretation, CrossEntropyLossFlat, CutMix, DataBlock,
    DataLoaders, EarlyStoppingCallback, FetchPredsCallback, FocalLossFlat, GradientAccumulation, GradientClip, GrandparentSplitter, ImageBlock, IndexSplitter, MixUp, Normalize,
    OptimWrapper, PILImage, PILImageBW, ProgressCallback, ReduceLROnPlateau, Resize, SGD, SaveModelCallback, Tensor, TransformBlock, ValueMetric, accuracy,
    error_rate, imagenet_stats, load_learner, nn, noop, params, parent_label, plt, ranger, resnet18, set_seed, tensor)
from safetensors.torch import load_file, save_file
from conftest import needs_timm
from resizer_fastai.data import UsageError, get_dls, get_path, image_files, read_image
from resizer_fastai.learner import (Autocast, EMACallback, FiniteLoss, Frozen, FusedAdamW, HalvedOptimizer, Muon, NonFiniteLoss, RecalibrateBN, ResizerClassifier, ResizerLR,
    resizer_learner)
from resizer_fastai.resizer import FixedResizer, Resizer, load_resizer
from resizer_fastai.show import Film

needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason='what these do where there is no CUDA')
stats = [tensor(o).view(-1, 1, 1) for o in imagenet_stats]
cats = lambda dls: [dls.vocab.o2i[f.parent.name] for f in dls.valid_ds.items]

def new_dls(**kwargs): return get_dls('sample', size=64, bs=10, limit=20, num_workers=0, device='cpu', **kwargs)

@pytest.fixture(scope='module')
def dls(): return new_dls()

@pytest.fixture
def make(dls, tmp_path):
    "Makes a learner that prints nothing and writes into `tmp_path`"
    def make(dls=dls, arch=resnet18, **kwargs):
        set_seed(0)
        learn = resizer_learner(dls, arch, **dict(size=32, pretrained=False, path=tmp_path) | kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return make

@pytest.fixture(autouse=True)
def no_figures():
    plt.close('all')
    yield
    plt.close('all')

def watch(event, look, order=100):
    "A callback that keeps what `look` sees at every `event`"
    cb = Callback(**{event: lambda self: self.seen.append(look(self))})
    cb.seen, cb.order = [], order
    return cb

def state(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def filters(learn, *parts):
    "Names of the weights of convolutions and linear layers, of those under `parts` only if there are any"
    names = {f'{n}.weight' for n, m in learn.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {n for n in names if n.startswith(parts)} if parts else names

def moved(a, b): return {k for k in a if not torch.equal(a[k], b[k])}

def moved_by(learn, *args):
    "Names of what one epoch of `fit` changes"
    before = state(learn)
    learn.fit(1, *args)
    return moved(before, state(learn))

def settle(learn):
    "Train a little, so that the running statistics are those of the data and predictions differ from image to image"
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 0.9
    learn.fit(1, 1e-3)
    return learn

def scripted(*values):
    "A metric that takes these values, epoch by epoch"
    values = iter(values)
    return ValueMetric(lambda: next(values), 'score')

# ---------------------------------------------------------------- schedules and parameter groups

def test_lr_find_suggests_a_rate_and_leaves_no_trace(make, tmp_path):
    "A suggestion comes back; weights, optimizer and folders are as before."
    data = sorted(get_path('sample').iterdir())
    trained = watch('after_cancel_fit', lambda cb: state(cb.learn))
    learn = make(cut=5, cbs=trained)
    learn.fit(1)
    before, opt = state(learn), deepcopy(learn.opt.state_dict())
    found = learn.lr_find(num_it=20, show_plot=False)
    assert 1e-7 < found.valley < 10
    assert filters(learn) <= moved(before, trained.seen[0])
    assert same(before, state(learn))
    assert learn.opt.state_dict()['param_groups'] == opt['param_groups']
    for k, v in opt['state'].items(): assert same(v, learn.opt.state_dict()['state'][k])
    assert sorted(get_path('sample').iterdir()) == data and list((tmp_path/'models').iterdir()) == []

def test_one_cycle(make):
    "The rate rises and falls, the momentum goes the other way, in every group of PyTorch's optimizer."
    groups = watch('before_step', lambda cb: [(g['lr'], g['betas'][0]) for g in cb.opt.opt.param_groups])
    learn = make()
    learn.fit_one_cycle(2, 1e-2, cbs=groups)
    lrs, moms = np.array(groups.seen).transpose(2, 0, 1)
    assert lrs.shape == (4, 6) and (lrs == lrs[:, :1]).all() and (moms == moms[:, :1]).all()
    assert np.allclose(lrs[:2, 0], [1e-2/25, 1e-2]) and np.allclose(moms[:2, 0], [0.95, 0.85])
    assert (np.diff(lrs[1:, 0]) < 0).all() and (np.diff(moms[1:, 0]) > 0).all()
    assert learn.recorder.lrs == lrs[:, 0].tolist()

def test_flat_cos(make):
    "The rate stays and then falls."
    learn = make()
    learn.fit_flat_cos(2, 1e-2, pct_start=0.5)
    assert np.allclose(learn.recorder.lrs, [1e-2, 1e-2, 1e-2, 0.5e-2], rtol=1e-4)

def test_fine_tune(make):
    "The body stands still for an epoch, then all moves; the resizer has the head's rate."
    before, after = watch('before_train', lambda cb: state(cb.learn)), watch('after_train', lambda cb: state(cb.learn))
    lr_of = lambda cb, part: {g['lr'] for g in cb.opt.opt.param_groups if set(g['params']) & set(params(part))}
    rates = watch('before_step', lambda cb: [lr_of(cb, o) for o in (cb.model.resizer, cb.model.body[0], cb.model.head)])
    learn = make()
    learn.fine_tune(1, 1e-2, cbs=[before, after, rates])
    frozen, unfrozen = [moved(a, b) & filters(learn) for a, b in zip(before.seen, after.seen)]
    assert frozen == filters(learn, 'resizer', 'head') and unfrozen == filters(learn)
    for resizer, body, head in rates.seen[2:]:
        assert resizer == head and len(head) == 1
        assert body.pop() == pytest.approx(head.pop()/100)

@pytest.mark.parametrize('n,parts', {-1: ('resizer', 'head'), 1: ('resizer', 'body.6', 'body.7', 'head'), 0: ('',)}.items())
def test_freeze_to(n, parts, make):
    "What is frozen stays; the resizer never is."
    learn = make()
    learn.freeze_to(n)
    assert moved_by(learn, 1e-2) & filters(learn) == filters(learn, *parts)
    learn.unfreeze()
    assert moved_by(learn, 1e-2) >= filters(learn)

@pytest.mark.parametrize('train_bn', [True, False])
def test_norms_of_a_frozen_body(train_bn, make):
    "They train unless told not to, and their running statistics move in either case."
    learn = make(train_bn=train_bn)
    learn.freeze()
    changed = moved_by(learn, 1e-2)
    norms = {n for n, m in learn.model.body.named_modules(prefix='body') if isinstance(m, nn.BatchNorm2d)}
    assert {f'{n}.running_mean' for n in norms} <= changed
    assert {n for n in norms if f'{n}.weight' in changed} == (norms if train_bn else set())

def test_discriminative_rates(make):
    "A slice spreads over the groups, the resizer's is the last, and a rate of 0 stops a group."
    learn = make()
    learn.fit(1, slice(1e-5, 1e-3))
    assert np.allclose([h['lr'] for h in learn.opt.hypers], [1e-5, 1e-4, 1e-3])
    learn.fit(1, slice(1e-3))
    assert np.allclose([h['lr'] for h in learn.opt.hypers], [1e-4, 1e-4, 1e-3])
    assert set(learn.opt.param_lists[-1]) == {*learn.model.resizer.parameters(), *learn.model.head.parameters()}
    assert moved_by(learn, [0., 0., 1e-2]) & filters(learn) == filters(learn, 'resizer', 'head')

def test_a_splitter_sees_the_joint_model(make):
    "Its groups are the optimizer's."
    given = []
    def split(model):
        given.append(model)
        return [params(model.resizer), params(model.body), params(model.head)]
    learn = make(splitter=split)
    learn.freeze()
    assert given == [learn.model] and [len(g) for g in learn.opt.param_lists] == [len(g) for g in split(learn.model)]
    assert moved_by(learn, 1e-2) & filters(learn) == filters(learn, 'head')

@pytest.mark.parametrize('opt_func', [Adam, SGD, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['Adam', 'SGD', 'torch'])
def test_other_optimizers(opt_func, make):
    "They train in the same groups."
    learn = make(opt_func=opt_func)
    learn.freeze()
    assert not isinstance(learn.opt, FusedAdamW)
    assert moved_by(learn, slice(1e-2)) & filters(learn) == filters(learn, 'resizer', 'head')
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-3, 1e-3, 1e-2])

def test_weight_decay_spares_norms_and_biases(make):
    "With no gradient, `wd` shrinks matrices and filters and nothing else."
    learn = make(wd=0.5, loss_func=lambda pred, y: 0*pred.sum())
    before = state(learn)
    learn.fit(1, 0.1)
    assert all(h['wd'] == 0.5 for h in learn.opt.hypers)
    for n, p in learn.model.named_parameters(): torch.testing.assert_close(p.detach(), before[n]*(0.95**2 if p.ndim > 1 else 1))

# ---------------------------------------------------------------- precision and memory format

@on_cpu
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['to_fp16', 'to_bf16', 'to_channelslast'])
def test_mixed_precision_of_fastai_on_the_cpu(name, make):
    "It computes in float32 there; training and predictions work."
    learn = make()
    getattr(learn, name)()
    assert hasattr(learn, 'mixed_precision')
    dtypes = []
    learn.model.body[0].register_forward_hook(lambda m, inp, out: dtypes.append(out.dtype))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert moved_by(learn, 1e-2) >= filters(learn)
    assert not [o for o in said if 'shadowing' in str(o.message)]
    preds, _ = learn.get_preds()
    assert preds.dtype == torch.float32 and torch.allclose(preds.sum(1), torch.ones(20))
    assert set(dtypes) == {torch.float32}

@pytest.mark.parametrize('name', ['to_fp16', 'to_bf16', 'to_channelslast'])
def test_one_precision_at_a_time(name, make):
    learn = make(cbs=Autocast())
    getattr(learn, name)()
    with pytest.raises(UsageError, match='Autocast stands in for to_fp16 and to_bf16'): learn.fit(1)
    make(cbs=Autocast()).to_channelslast(use_amp=False).fit(1)

def test_channels_last(make):
    "Filters lie channels last, and give what they gave before."
    learn = make()
    wide = [m for m in learn.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1, 1) and m.in_channels > 1]
    is_last = lambda: {m.weight.is_contiguous(memory_format=torch.channels_last) for m in wide}
    preds, _ = learn.get_preds()
    assert is_last() == {False}
    learn.to_channelslast(use_amp=False)
    again, _ = learn.get_preds()
    assert is_last() == {True}
    torch.testing.assert_close(again, preds, atol=1e-5, rtol=0)
    learn.to_contiguous()
    assert is_last() == {False}

# ---------------------------------------------------------------- callbacks

def test_gradient_accumulation(make):
    "Two batches make one step, and nothing moves before it."
    weights = watch('after_batch', lambda cb: cb.model.resizer.out.weight.detach().clone() if cb.training else None)
    learn = make(cbs=[GradientAccumulation(20), weights])
    before = learn.model.resizer.out.weight.detach().clone()
    learn.fit(2, 1e-2)
    a, b, *_, c, d, _, _ = weights.seen
    assert torch.equal(a, before) and not torch.equal(b, a) and torch.equal(c, b) and not torch.equal(d, c)
    assert {int(s['step']) for s in learn.opt.opt.state.values()} == {2}

def test_gradient_clip(make):
    "The norm of all gradients, the resizer's among them, is cut down at every step."
    norm = lambda cb: torch.cat([p.grad.double().flatten() for p in cb.model.parameters()]).norm().item()
    before, after = watch('before_step', norm, order=0), watch('before_step', norm)
    resizer = watch('before_step', lambda cb: cb.model.resizer.out.weight.grad.norm().item())
    make().fit(1, 1e-2, cbs=[before, GradientClip(0.1), after, resizer])
    assert len(after.seen) == 2 and min(before.seen) > 0.2 and min(resizer.seen) > 0
    assert after.seen == pytest.approx([0.1, 0.1], rel=1e-4)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing(mix, make):
    "Every image that the model sees holds another, and the loss is that of both."
    before, seen = watch('before_batch', lambda cb: cb.x.clone(), order=-1), []
    cb = mix()
    learn = make(cbs=[before, cb])
    learn.model.register_forward_pre_hook(lambda m, inp: seen.append(inp[0].clone()) if m.training else None)
    loss = watch('after_loss', lambda o: (o.training and cb.lam.clone(), cb.yb1[0], o.y, o.pred.detach(), o.loss.detach()))
    learn.add_cb(loss)
    assert moved_by(learn, 1e-2) >= filters(learn)
    assert len(seen) == 2
    for x, mixed, (lam, y1, y, pred, got) in zip(before.seen, seen, loss.seen):
        x, mixed = x.as_subclass(Tensor), mixed.as_subclass(Tensor)
        assert (x-mixed).abs().max() > 0.1
        if mix is MixUp: pairs = torch.lerp(x[:, None], x[None], lam.view(1, -1, 1, 1, 1))
        else: pairs = torch.where(mixed[None] == x[None], x[None], x[:, None])
        assert ((pairs-mixed).abs().amax((2, 3, 4)) < 1e-5).any(0).all()
        each = [F.cross_entropy(pred, o, reduction='none') for o in (y, y1)]
        torch.testing.assert_close(got, (lam*each[0] + (1-lam)*each[1]).mean())
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

def test_save_model_callback(make, tmp_path):
    "The best epoch's model is on disk, and in the learner at the end."
    epochs = watch('after_epoch', lambda cb: state(cb.learn))
    learn = make(cut=5, metrics=scripted(1, 3, 2))
    learn.fit(3, 1e-2, cbs=[SaveModelCallback('score', fname='best'), epochs])
    assert same(state(learn), epochs.seen[1]) and not same(epochs.seen[1], epochs.seen[2])
    assert [p.name for p in (tmp_path/'models').iterdir()] == ['best.pth']

def test_early_stopping(make):
    "Training stops when the metric has not risen for as long as it may."
    learn = make(cut=5, metrics=scripted(1, 2, 1, 1, 3))
    learn.fit(5, 1e-2, cbs=EarlyStoppingCallback('score', patience=2))
    assert [o[-1] for o in learn.recorder.values] == [1, 2, 1, 1]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('trace_model', [False, True])
def test_tensorboard(trace_model, make, tmp_path):
    "Losses, rates, metrics, pictures of predictions and the graph are in the log."
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make(metrics=accuracy)
    learn.fit(1, 1e-2, cbs=TensorBoardCallback(tmp_path/'log', trace_model=trace_model, log_preds=True))
    log = EventAccumulator(str(tmp_path/'log')).Reload()
    read = lambda name: list({o.step: o.value for o in log.Scalars(name)}.values())
    assert read('train_loss') == pytest.approx([float(o) for o in learn.recorder.losses]) and read('lr_2') == pytest.approx([1e-2]*2)
    assert [read('valid_loss')[0], read('accuracy')[0]] == pytest.approx(learn.recorder.values[0][1:])
    assert len(log.Images('Sample results')) == 1
    assert log.Tags()['graph'] == trace_model
    if trace_model: assert any('resizer' in n.name for n in tensorboard_graph(log).node)

def tensorboard_graph(log):
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    return GraphDef.FromString(log._graph)

def test_callbacks_given_to_the_learner_run(make):
    "`cbs` takes one or a list."
    one, two = (watch('after_batch', lambda cb: cb.training) for _ in range(2))
    make(cut=5, cbs=one).fit(1)
    make(cut=5, cbs=[two]).fit(1)
    assert one.seen == two.seen == [True, True, False, False]

# ---------------------------------------------------------------- predictions

def test_get_preds_order(make):
    "Predictions stand in the order of the files, for a shuffled loader and for files of one's own, as those of the model alone do."
    learn = settle(make())
    files = list(learn.dls.valid_ds.items)
    preds, targs = learn.get_preds()
    assert targs.tolist() == cats(learn.dls)
    shuffled, targs = learn.get_preds(dl=learn.dls.valid.new(shuffle=True))
    assert targs.tolist() == cats(learn.dls)
    torch.testing.assert_close(shuffled, preds, atol=1e-6, rtol=0)
    own, _ = learn.get_preds(dl=learn.dls.test_dl(files[::-1]))
    torch.testing.assert_close(own, preds.flip(0), atol=1e-6, rtol=0)
    names, _, probs = learn.model.predict(files)
    torch.testing.assert_close(probs, preds, atol=1e-4, rtol=0)
    assert names == [learn.dls.vocab[i] for i in preds.argmax(1)]
    assert (preds-preds[:1]).abs().max() > 1e-3

def test_predict(make):
    "One image gets the class of `get_preds`, whatever it comes as."
    learn = settle(make())
    preds, _ = learn.get_preds()
    for i in (0, 9, 19):
        file = learn.dls.valid_ds.items[i]
        for o in (file, str(file), PILImage.create(file), read_image(file), file.read_bytes()):
            name, at, probs = learn.predict(o)
            assert at == preds[i].argmax() and name == learn.dls.vocab[at]
            torch.testing.assert_close(probs, preds[i], atol=1e-5, rtol=0)

def test_tta(make):
    "It averages over training's transforms, and leaves validation without them."
    learn = settle(make())
    preds, targs = learn.get_preds()
    aug, plain = learn.tta(n=2, beta=None)[0]
    torch.testing.assert_close(plain, preds, atol=1e-6, rtol=0)
    assert ((aug-plain).abs().amax(1) > 1e-5).sum() > 5
    mixed, labels = learn.tta(n=2)
    assert torch.equal(labels, targs) and torch.allclose(mixed.sum(1), torch.ones(20)) and not torch.allclose(mixed, preds, atol=1e-5)
    assert torch.equal(learn.get_preds()[0], preds)

def test_metrics_and_loss(make):
    "What `validate` says follows from the predictions, under a loss of the user's."
    learn = settle(make(metrics=[accuracy, error_rate], loss_func=FocalLossFlat(gamma=3.)))
    preds, targs = learn.get_preds()
    loss, acc, err = learn.validate()
    right = (preds.argmax(1) == targs).float().mean().item()
    p = preds[range(20), targs]
    assert torch.allclose(preds.sum(1), torch.ones(20))
    assert [loss, acc, err] == pytest.approx([(-(1-p)**3*p.log()).mean().item(), right, 1-right], rel=1e-4)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'error_rate', 'time']

def test_summary(make):
    "It names the resizer's layers, counts parameters, and says what is frozen."
    learn = make()
    count = lambda train: sum(p.numel() for p in learn.model.parameters() if p.requires_grad or not train)
    learn.unfreeze()
    text = str(learn.summary())
    assert text.startswith('ResizerClassifier') and 'Model unfrozen' in text and f'Total params: {count(False):,}\n' in text
    assert re.search(r'10 x 16 x 64 x 64.*\nConv2d +2368 +True', text) and 'LeakyReLU' in text
    learn.freeze()
    text = str(learn.summary())
    assert 'frozen up to parameter group #2' in text and f'Total trainable params: {count(True):,}\n' in text
    assert count(True) < count(False)/5
    assert re.search(r'Conv2d +2368 +True', text) and re.search(r'Conv2d +9408 +False', text)

# ---------------------------------------------------------------- looking

def panels(): return [(ax.get_images()[0].get_array(), ax.get_title()) for ax in plt.gcf().axes if ax.get_images()]

def near(im, file): return abs(np.asarray(im, int)-read_image(file, 64).numpy()).max() <= 1

def test_show_batch_shows_the_images(dls, make):
    "As they are in the files, with their classes, after normalisation."
    make()
    dls.valid.show_batch(max_n=4)
    assert len(panels()) == 4
    for (im, title), file in zip(panels(), dls.valid_ds.items):
        assert title == file.parent.name
        assert near(im, file)

def test_show_results(make):
    "Each image has its class above the one that is predicted."
    learn = settle(make())
    _, _, preds = learn.get_preds(with_decoded=True)
    learn.show_results(shuffle=False, max_n=6)
    names = [f.parent.name for f in learn.dls.valid_ds.items]
    assert [t for _, t in panels()] == [f'{a}\n{learn.dls.vocab[p]}' for a, p in zip(names, preds[:6])]

def test_interpretation(make):
    "Confusion matrix, most confused and top losses follow from the predictions."
    learn = settle(make(metrics=accuracy))
    preds, targs, losses = learn.get_preds(with_loss=True)
    interp = ClassificationInterpretation.from_learner(learn)
    cm = interp.confusion_matrix()
    assert cm.sum() == 20 and (cm.sum(1) == 2).all() and cm.trace()/20 == pytest.approx(learn.validate()[1])
    confused = interp.most_confused()
    assert sum(n for *_, n in confused) == 20-cm.trace() > 0
    a, b, n = confused[0]
    assert cm[learn.dls.vocab.o2i[a], learn.dls.vocab.o2i[b]] == n == (cm-np.diag(cm.diagonal())).max()
    interp.plot_confusion_matrix()
    assert sorted(int(o.get_text()) for o in plt.gca().texts) == sorted(cm.flatten())
    at = losses.argsort(descending=True)[:3]
    worst, idxs = interp.top_losses(3)
    assert idxs.tolist() == at.tolist()
    torch.testing.assert_close(worst.as_subclass(Tensor), losses[at], atol=1e-5, rtol=1e-5)
    interp.plot_top_losses(3)
    vocab = learn.dls.vocab
    assert [t for _, t in panels()] == [f'{vocab[preds[i].argmax()]}/{vocab[targs[i]]} / {losses[i].item():.2f} / {preds[i].max().item():.2f}' for i in at]
    for (im, _), i in zip(panels(), at): assert near(im, learn.dls.valid_ds.items[i])

# ---------------------------------------------------------------- files

def test_export_holds_weights_and_no_images(make, tmp_path):
    "A loaded learner predicts the same; the learner that was exported can go on."
    learn = settle(make(new_dls(cache='ram')))
    before, opt = state(learn), deepcopy(learn.opt.state_dict()['state'])
    learn.export('learn.pkl')
    n_bytes = sum(v.nbytes for v in before.values())
    assert (tmp_path/'learn.pkl').stat().st_size-n_bytes < 300_000 < 40*64*64*3
    with warnings.catch_warnings(action='ignore'): again = load_learner(tmp_path/'learn.pkl')
    files = learn.dls.valid_ds.items
    a, b = (o.get_preds(dl=o.dls.test_dl(files))[0] for o in (learn, again))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert same(before, state(again)) and again.dls.vocab == learn.dls.vocab
    for k, v in opt.items(): assert same(v, learn.opt.state_dict()['state'][k])
    assert moved_by(learn, 1e-2) >= filters(learn)

def test_save_and_load_with_the_optimizer(make):
    "Another learner goes on as the first one would have."
    def one_more(learn):
        set_seed(1)
        learn.dls.train.rng = random.Random(1)
        learn.fit_one_cycle(1, 1e-2)
        return state(learn)
    first, other, bare = [make(cut=5) for _ in range(3)]
    first.fit_one_cycle(1, 1e-2)
    first.save('both')
    first.save('weights', with_opt=False)
    other.load('both')
    bare.load('weights', with_opt=False)
    assert same(state(first), state(other)) and same(state(first), state(bare))
    wanted = one_more(first)
    assert same(wanted, one_more(other)) and not same(wanted, one_more(bare))

def test_save_pretrained_keeps_every_choice(make, tmp_path):
    "Arguments of head, cut and resizer come back with the weights."
    learn = settle(make(arch='resnet18', cut=-3, lin_ftrs=[16], ps=0.1, resizer_args=dict(num_resblocks=1, num_kernels=8), size=(24, 32)))
    learn.save_pretrained(tmp_path/'m')
    model = ResizerClassifier.from_pretrained(tmp_path/'m')
    assert len(model.resizer.blocks) == 1 and len(model.body) == 7 and model.head[-1].in_features == 16 and model.resizer.size == (24, 32) and not model.training
    torch.testing.assert_close(model.predict(list(learn.dls.valid_ds.items))[2], learn.get_preds()[0], atol=1e-4, rtol=0)

def test_from_pretrained_is_strict_and_downloads_nothing(make, tmp_path, monkeypatch):
    "A file without the head, or with more than the model has, is refused; `pretrained` in the configuration is not believed."
    make(arch='resnet18').save_pretrained(tmp_path/'m')
    config, file = tmp_path/'m'/'config.json', tmp_path/'m'/'model.safetensors'
    weights = load_file(file)
    def no_download(*args, **kwargs): raise AssertionError('wanted to download')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_download)
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(pretrained=True)))
    assert same(weights, ResizerClassifier.from_pretrained(tmp_path/'m').state_dict())
    save_file({k: v for k, v in weights.items() if not k.startswith('head')}, file)
    with pytest.raises(RuntimeError, match='Missing key'): ResizerClassifier.from_pretrained(tmp_path/'m')
    save_file(weights | dict(more=torch.zeros(1)), file)
    with pytest.raises(RuntimeError, match='Unexpected key'): ResizerClassifier.from_pretrained(tmp_path/'m')

def test_a_function_without_a_name_is_not_dropped_in_silence(make, tmp_path):
    "The Hub's mixin would leave a callable out of `config.json`."
    def own(pretrained=False): return resnet18()
    learn = make(arch=own, cut=-2)
    learn.fit(1)
    with pytest.raises(ValueError, match='cannot hold arch'): learn.save_pretrained(tmp_path/'m')
    assert not list((tmp_path/'m').glob('*.json')) and not list((tmp_path/'m').glob('*.safetensors'))

def test_nothing_is_written_into_the_data(dls, tmp_path, monkeypatch):
    "Without `path`, all that a learner writes lies in the current folder."
    monkeypatch.chdir(tmp_path)
    data = sorted(get_path('sample').rglob('*'))
    learn = resizer_learner(dls, resnet18, size=32, pretrained=False, cut=5)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SaveModelCallback())
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        learn.export()
    assert sorted(get_path('sample').rglob('*')) == data
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*')) == ['export.pkl', 'models', 'models/model.pth']

# ---------------------------------------------------------------- bodies, heads and images of other kinds

def test_custom_head(make):
    "It stands in place of fastai's, in the last group, and trains."
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    learn = make(custom_head=head)
    assert learn.model.head is head
    learn.freeze()
    assert moved_by(learn, 1e-2) & filters(learn) == filters(learn, 'resizer', 'head') and 'head.2.weight' in filters(learn)

def test_cut(make):
    "The body ends where it is told to, and the head fits it."
    learn = make(cut=-3)
    assert len(learn.model.body) == 7
    assert learn.model.body(torch.rand(2, 3, 32, 32)).shape[1] == 256
    assert moved_by(learn, 1e-2) >= filters(learn)
    assert learn.get_preds()[0].shape == (20, 10)

def grey_dls():
    files = image_files(get_path('sample'))[::20]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=lambda _: files, get_y=parent_label,
                      splitter=GrandparentSplitter(valid_name='val'), item_tfms=Resize(64))
    return block.dataloaders('', bs=10, device='cpu')

def four_dls():
    block = DataBlock((TransformBlock(), CategoryBlock(vocab=[0, 1, 2])), get_x=lambda i: torch.full((4, 48, 64), i/40), get_y=lambda i: i % 3,
                      get_items=lambda _: range(40), splitter=IndexSplitter(range(20)))
    return block.dataloaders('', bs=10, device='cpu')

@pytest.mark.parametrize('n_in,make_dls', [(1, grey_dls), (4, four_dls)])
def test_other_channels(n_in, make_dls, make):
    "Resizer and body take as many channels as the images have; the images are not normalised with colours' statistics."
    learn = make(make_dls(), n_in=n_in)
    x = learn.dls.valid.one_batch()[0]
    assert x.shape[1] == n_in and 0 <= x.min() and x.max() <= 1
    out = []
    learn.model.resizer.register_forward_hook(lambda m, inp, res: out.append(res.shape[1:]))
    assert moved_by(learn, 1e-2) >= filters(learn)
    assert set(out) == {(n_in, 32, 32)} and learn.model.body[0].in_channels == n_in
    preds, _ = learn.get_preds()
    assert preds.shape == (len(learn.dls.valid_ds), learn.dls.c)

@pytest.mark.parametrize('kwargs,mean,std', [({}, *stats), (dict(normalize=False), 0, 1)], ids=['normalised', 'raw'])
def test_batches_are_normalised_from_random_weights_too(kwargs, mean, std, make):
    "Unless that is not wanted."
    dls = new_dls()
    make(dls, **kwargs)
    x, _ = dls.valid.one_batch()
    wanted = torch.stack([read_image(f, 64).permute(2, 0, 1)/255 for f in dls.valid_ds.items[:10]])
    torch.testing.assert_close(x.as_subclass(Tensor), (wanted-mean)/std, atol=1e-5, rtol=0)

def plain_dls(size):
    "What `DataBlock` alone makes of the drawn images"
    files = image_files(get_path('sample'))[::20]
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=parent_label, splitter=GrandparentSplitter(valid_name='val'), item_tfms=Resize(size))
    return block.dataloaders('', bs=10, device='cpu')

@pytest.mark.parametrize('larger', [lambda: get_dls('sample', size=(96, 128), bs=10, limit=20, num_workers=0, device='cpu'), lambda: plain_dls((96, 128))], ids=['get_dls', 'DataBlock'])
def test_training_goes_on_with_larger_images(larger, make, tmp_path):
    "Normalised as the first; what is saved reads them as training did, also after an export, which empties the loaders for a while."
    learn = settle(make())
    learn.dls = dls = larger()
    settle(learn)
    learn.export('learner.pkl')
    assert learn.dls is dls and load_learner(tmp_path/'learner.pkl').dls.train_ds.items == []
    preds, _ = learn.get_preds()
    learn.save_pretrained(tmp_path/'m')
    model = ResizerClassifier.from_pretrained(tmp_path/'m')
    assert list(model.read.size) == [96, 128]
    torch.testing.assert_close(model.predict(list(dls.valid_ds.items))[2], preds, atol=1e-4, rtol=0)

def test_other_images_have_to_fit(make):
    "As many classes, a size that the body takes, and a warning where they are normalised in another way; what does not fit changes nothing."
    learn = make()
    dls = learn.dls
    with pytest.raises(UsageError, match='tells 10 classes apart, and these images have 3'): learn.dls = four_dls()
    vit = make(get_dls('sample', size=224, bs=10, limit=20, num_workers=0, device='cpu'), 'vit_b_32', resizer='none')
    with pytest.raises(UsageError, match='vit_b_32 cannot take images of 3x64x64'): vit.dls = dls
    assert learn.dls is dls and learn.model.read.size == [64, 64] and vit.model.read.size == [224, 224]
    other = new_dls()
    other.add_tfms([Normalize.from_stats([0.5]*3, [0.25]*3, cuda=False)], 'after_batch')
    with pytest.warns(UserWarning, match='for this model it should be'): learn.dls = other

def test_normalisation_of_ones_own_stays_the_only_one(make, tmp_path):
    "It goes with the model that is saved."
    dls = new_dls()
    dls.add_tfms([Normalize.from_stats([0.5]*3, [0.25]*3, cuda=False)], 'after_batch')
    learn = make(dls)
    first = read_image(dls.valid_ds.items[0], 64).permute(2, 0, 1)/255
    torch.testing.assert_close(dls.valid.one_batch()[0][0].as_subclass(Tensor), (first-0.5)/0.25, atol=1e-5, rtol=0)
    learn.save_pretrained(tmp_path/'m')
    probs = ResizerClassifier.from_pretrained(tmp_path/'m').predict(list(dls.valid_ds.items))[2]
    torch.testing.assert_close(probs, learn.get_preds()[0], atol=1e-4, rtol=0)

# ---------------------------------------------------------------- Ctrl-C

def ctrl_c(*args): raise KeyboardInterrupt

@pytest.mark.parametrize('where', ['before_batch', 'forward', 'after_loss', 'before_step', 'before_validate'])
def test_an_interrupted_learner_goes_on(where, make):
    "Predictions, training and precision are as if nothing had happened."
    learn = make(cut=5, size=16, cbs=Autocast())
    if where == 'forward': at = learn.model.body[0].register_forward_hook(ctrl_c).remove
    else:
        stop = learn.add_cb(Callback(**{where: ctrl_c})).cbs[-1]
        at = partial(learn.remove_cb, stop)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2)
    at()
    assert not torch.is_autocast_enabled('cpu')
    preds, targs = learn.get_preds()
    assert preds.dtype == torch.float32 and targs.tolist() == cats(learn.dls)
    assert learn.model.autocast_dtype is None
    dtypes = []
    learn.model.body[0].register_forward_hook(lambda m, inp, out: dtypes.append(out.dtype))
    assert moved_by(learn, 1e-2) >= filters(learn) and len(learn.recorder.values) == 1
    assert set(dtypes) == {torch.bfloat16}

# ---------------------------------------------------------------- this library's callbacks

def part(state, name): return {k: v for k, v in state.items() if k.startswith(name)}

def test_average_and_best(make, tmp_path):
    "The best file holds weights and average; both come back, and the learner ends with the average of that epoch."
    validated = watch('before_validate', lambda cb: state(cb.learn))
    trained = watch('after_train', lambda cb: state(cb.learn), order=0)
    learn = make(cut=5, metrics=scripted(1, 3, 2), cbs=[EMACallback(0.8), SaveModelCallback('score', fname='best'), trained, validated])
    learn.fit(3, 1e-2)
    saved = torch.load(tmp_path/'models'/'best.pth')
    saved = saved.get('model', saved)
    raw = {k: v for k, v in saved.items() if not k.startswith('average.')}
    average = {k.removeprefix('average.module.'): v for k, v in part(saved, 'average.module.').items()}
    assert same(average, validated.seen[1]) and same(state(learn), validated.seen[1])
    assert moved(raw, trained.seen[1]) == set() and moved(raw, average) >= filters(learn)

def test_average_is_what_it_says(make):
    "After n steps it is the recursion of its definition, with a decay that grows to the one asked for."
    steps = watch('after_step', lambda cb: cb.model.resizer.out.weight.detach().clone(), order=0)
    learn = make(cut=5, cbs=[EMACallback(0.3), steps])
    learn.fit(3, 1e-2)
    wanted = steps.seen[0]
    for n, w in enumerate(steps.seen[1:], 1): wanted = torch.lerp(w, wanted, min(0.3, (1+n)/(10+n)))
    torch.testing.assert_close(learn.resizer.out.weight.detach(), wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(wanted, steps.seen[-1])

def test_indices_are_not_averaged(make):
    "Buffers of whole numbers, such as the places of a transformer's biases"
    learn = make(cut=5, cbs=EMACallback(0.9))
    learn.model.body.register_buffer('index', torch.arange(1000))
    learn.fit(8, 1e-3)
    assert torch.equal(learn.model.body.index, torch.arange(1000))

def test_average_survives_an_interruption(make):
    "Ctrl-C in validation, when the average is in the model: the next fit starts from the weights."
    learn = make(cut=5, cbs=EMACallback(0.9))
    trained = watch('after_train', lambda cb: state(cb.learn), order=0)
    stop = Callback(before_validate=ctrl_c)
    stop.order = 90
    learn.add_cbs([trained, stop])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2)
    assert not same(state(learn), trained.seen[0])
    learn.remove_cb(stop)
    start = watch('before_train', lambda cb: state(cb.learn))
    learn.fit(1, 1e-2, cbs=start)
    assert moved(start.seen[0], trained.seen[0]) == set()
    assert not [k for k in learn.model.state_dict() if k.startswith('average')]

@pytest.mark.parametrize('cb', [EMACallback(), RecalibrateBN(2), ResizerLR(0.5), Frozen('body'), FiniteLoss(), Autocast()], ids=repr)
def test_callbacks_go_with_the_others(cb, make, tmp_path):
    "lr_find, get_preds, export and a second fit work with each of them in the learner."
    learn = make(cut=5, size=16, cbs=cb)
    before = state(learn)
    assert learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None) is None
    assert same(state(learn), before)
    learn.fit(1, 1e-3)
    preds, _ = learn.get_preds()
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    learn.export('learn.pkl')
    with warnings.catch_warnings(action='ignore'): again = load_learner(tmp_path/'learn.pkl')
    torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(learn.dls.valid_ds.items))[0], preds, atol=1e-5, rtol=0)
    torch.testing.assert_close(learn.get_preds()[0], preds, atol=1e-5, rtol=0)
    learn.fit(1, 1e-3)
    assert len(learn.recorder.values) == 1 and all(p.requires_grad for p in learn.model.parameters())

def test_recalibration_leaves_training_alone(make):
    "The same weights come out, to the bit; only running statistics differ, and they are those of the training images."
    def trained(cbs):
        learn = make(new_dls(), cut=5)
        learn.dls.train.rng = random.Random(0)
        set_seed(1)
        learn.fit(2, 1e-2, cbs=cbs)
        return learn
    a, b = trained(None), trained(RecalibrateBN())
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    first = b.resizer.stem[-1]
    seen = []
    first.register_forward_pre_hook(lambda m, inp: seen.append(inp[0]))
    with torch.no_grad(): b.model(torch.cat([x.as_subclass(Tensor) for x, _ in b.dls.train]))
    means = lambda m: m.resizer.stem[-1].running_mean
    wanted = seen[0].mean((0, 2, 3))
    assert (means(b.model)-wanted).norm() < 0.1*(means(a.model)-wanted).norm()

@pytest.mark.parametrize('opt_func', [Adam, pytest.param(Muon, marks=needs_timm), ranger])
def test_frozen_parts_do_not_follow_the_optimizer(make, opt_func):
    "Neither momentum nor weight decay nor a head that trains moves them, with fastai's own optimizers; nor do the slow weights of `Lookahead`."
    learn = make(cut=5, opt_func=opt_func, wd=0.1)
    learn.fit(1, 1e-2)
    before = state(learn)
    learn.fit(3, 1e-2, cbs=Frozen('resizer'))
    assert opt_func is not ranger or learn.opt.count//learn.opt.k == 1
    assert {k.split('.')[0] for k in moved(before, state(learn))} == {'body', 'head'}

@pytest.mark.parametrize('mult', [0.1, 5])
@pytest.mark.parametrize('opt_func', [FusedAdamW, pytest.param(Muon, marks=needs_timm), SGD, ranger])
def test_a_rate_of_its_own_is_that_of_a_group_of_its_own(make, opt_func, mult):
    "So over many steps, those in which `Lookahead` pulls back among them, and those that are skipped; with drawn gradients, as others would follow every rounding"
    def draw(self):
        for p in self.model.parameters(): p.grad = 1+torch.randn(p.shape)
        if self.train_iter in skipped[0]: raise CancelStepException
    def skip(self):   # as for gradients that are not finite
        if self.train_iter in skipped[1]: raise CancelStepException
    skipped, late = [(3, 9), (6, 8, 11)], Callback(before_step=skip)
    late.order = 60
    def trained(lr, **kwargs):
        learn = make(cut=5, opt_func=opt_func, cbs=[Callback(before_step=draw), late], **kwargs)
        before = nn.utils.parameters_to_vector(learn.resizer.parameters()).detach()
        set_seed(1)
        learn.fit(10, lr)
        assert opt_func is not ranger or learn.opt.count//learn.opt.k == 2
        return nn.utils.parameters_to_vector(learn.resizer.parameters()).detach()-before
    apart = trained([mult*1e-3, 1e-3], splitter=lambda m: [params(m.resizer), params(m.body)+params(m.head)])
    assert (trained(1e-3, lr_mult=mult)-apart).norm() < 1e-4*apart.norm()

def test_another_resizer_keeps_what_is_frozen(make):
    "The optimizer gets the new parameters, and the body stays frozen."
    learn = make(cut=5)
    learn.freeze()
    learn.resizer = Resizer(32, num_resblocks=1)
    assert moved_by(learn, 1e-2) & filters(learn) == filters(learn, 'resizer', 'head')
    learn.resizer = FixedResizer(32, antialias=True)
    assert learn.model._hub_mixin_config['resizer_args']['antialias'] and not [n for n, _ in learn.model.named_parameters() if n.startswith('resizer')]

def test_a_new_learned_resizer_starts_as_in_the_learner(make, monkeypatch):
    "In front of pretrained weights as the plain resize, and at a hundredth of the rate"
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: resnet18().state_dict())
    for pretrained in (True, False):
        learn = make(resizer='bilinear', pretrained=pretrained)
        learn.resizer = 'learned'
        def rates(): return [o.mult for o in learn._grab_cbs(ResizerLR)]
        assert learn.resizer.zero_init == pretrained and rates() == [0.01]*pretrained
        learn.resizer = 'muller'
        assert rates() == []
        learn.resizer = Resizer(32)
        assert rates() == [0.01]*pretrained
        learn = make(resizer='bilinear', pretrained=pretrained, lr_mult=0.5)
        learn.resizer = 'learned'
        assert rates() == [0.5]

def test_a_saved_model_tells_one_class_an_image(make, tmp_path):
    "Of a loss that has other probabilities it is not saved, as `predict` would give wrong ones."
    with pytest.raises(UsageError, match='BCEWithLogitsLossFlat has not: use learn.export'): make(loss_func=BCEWithLogitsLossFlat()).save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()
    for o in (FocalLossFlat(), nn.CrossEntropyLoss()): make(loss_func=o).save_pretrained(tmp_path/'m')

@pytest.mark.parametrize('f,says', [(lambda: EMACallback(99.9), 'decay is between 0 and 1: got 99.9'), (lambda: RecalibrateBN(0), 'n is a number of batches, 1 or more: got 0'),
    (lambda: ResizerClassifier('resnet18', 2, size=32, input_size=64).predict([]), 'there are no images to classify')])
def test_what_makes_no_sense_is_refused(f, says):
    with pytest.raises(ValueError, match=says): f()

def test_the_model_is_where_it_trains_when_its_optimizer_is_made(make):
    "Or what `learn.load` brings back would stay behind."
    learn = make(get_dls('sample', size=64, bs=10, limit=20, num_workers=0, device='meta'))
    learn.create_opt()
    assert {p.device.type for g in learn.opt.opt.param_groups for p in g['params']} == {'meta'}

def test_an_optimizer_without_every_hyper_parameter():
    opt = HalvedOptimizer([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], partial(torch.optim.SGD, momentum=0.9), lr=0.1, wd=0.5)
    assert [dict(h) for h in opt.hypers] == [dict(lr=0.1, mom=0.9, wd=0.5)]

def test_pretrained_weights_know_no_unshuffled_pixels():
    with pytest.raises(UsageError, match='skip_mode=unshuffle are none that pretrained weights know'):
        ResizerClassifier('resnet18', pretrained=True, resizer_args=dict(out_channels=12, skip_mode='unshuffle'))

@pytest.mark.parametrize('strict', [False, True])
def test_a_model_is_exported(strict):
    model, x = ResizerClassifier('resnet18', 4, 'learned', 32, input_size=64).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_predict_in_half_precision(dtype):
    model, im = ResizerClassifier('resnet18', 4, 'learned', 32, input_size=64), np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    want = model.predict(im)[2]
    torch.testing.assert_close(model.to(dtype).predict(im)[2], want, atol=0.05, rtol=0)

def test_what_an_average_wrote_can_be_read(make, tmp_path):
    "After the fit, in a new learner, and by `from_pretrained`: what comes back is what was validated."
    validated = watch('before_validate', lambda cb: state(cb.learn))
    hub = Callback(after_epoch=lambda self: self.learn.save_pretrained(tmp_path/'m'))
    learn = make(arch='resnet18', cut=5, metrics=scripted(1, 3), cbs=[EMACallback(0.8), SaveModelCallback('score', fname='best'), validated, hub])
    learn.fit(2, 1e-2)
    learn.load('best')
    assert same(state(learn), validated.seen[1])
    other = make(arch='resnet18', cut=5)
    other.load('best')
    assert same(state(other), validated.seen[1])
    assert same(ResizerClassifier.from_pretrained(tmp_path/'m').state_dict(), validated.seen[1])

@pytest.mark.parametrize('copy', [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['copied', 'pickled'])
def test_a_copy_of_a_model_that_is_averaged(copy, make):
    "Of what training, or validation, has in the model; it averages nothing, and loads what a file holds for validation."
    look = lambda cb: (copy(cb.learn.model), state(cb.learn))
    trained, validated = watch('after_train', look), watch('before_validate', look)
    learn = make(cut=5, cbs=[EMACallback(0.8), trained, validated])
    learn.fit(1, 1e-2, cbs=SaveModelCallback(fname='end', at_end=True))
    for model, was in trained.seen+validated.seen: assert same(model.state_dict(), was)
    learn.model = trained.seen[0][0]
    learn.load('end')
    assert same(state(learn), validated.seen[0][1])

def test_average_is_in_the_file_of_the_end(make, tmp_path):
    make(cut=5, cbs=EMACallback(0.8)).fit(1, 1e-2, cbs=SaveModelCallback(fname='end', at_end=True))
    saved = torch.load(tmp_path/'models'/'end.pth')
    assert any(k.startswith('average.module.') for k in saved.get('model', saved))

def test_load_after_an_interrupted_validation(make):
    "What is loaded stays, with an average in the learner or not."
    learn = make(cut=5, cbs=EMACallback(0.9))
    learn.save('clean')
    clean = state(learn)
    stop = Callback(before_validate=ctrl_c)
    stop.order = 90
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=stop)
    learn.load('clean')
    learn.validate()
    assert same(state(learn), clean)

@pytest.mark.parametrize('where', ['before_step', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('kept', [True, False], ids=['in the learner', 'for one fit'])
def test_the_best_after_an_interruption(make, where, kept):
    "It comes back as it was validated, and can be saved, loaded and trained again, though nobody told the average of the end."
    validated = watch('before_validate', lambda cb: state(cb.learn))
    stop = Callback(**{where: lambda self: ctrl_c() if self.epoch == 1 else None})
    stop.order = 90
    cbs = [EMACallback(0.8), SaveModelCallback('score', fname='best')]
    learn = make(cut=5, metrics=scripted(3, 1, 1), cbs=[validated, *cbs[:kept]])
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[*cbs[kept:], stop])
    best = validated.seen[0]
    learn.load('best')
    assert same(state(learn), best)
    learn.validate()
    assert same(state(learn), best)
    learn.save('again')
    if not kept: learn.fit(1, 1e-2)
    learn.load('again')
    assert same(state(learn), best)
    learn.fit(1, 1e-2, cbs=[] if kept else EMACallback(0.8))
    assert same(state(learn), validated.seen[-1]) and not [k for k in learn.model.state_dict() if k.startswith('average')]

@pytest.mark.parametrize('event,stop', [('before_validate', CancelValidException), ('after_pred', CancelEpochException), ('after_pred', CancelFitException)])
def test_average_and_a_validation_that_is_cancelled(make, event, stop):
    "Training goes on with the weights, and the learner ends with the average."
    def cancel(self):
        if not self.training and self.epoch == 1: raise stop
    trained, started = watch('after_train', lambda cb: (state(cb.learn), deepcopy(cb.ema.average.module.state_dict())), order=0), watch('before_batch', lambda cb: cb.training and cb.iter == 0 and state(cb.learn))
    learn = make(cut=5, cbs=[EMACallback(0.8), trained, started, Callback(**{event: cancel})])
    learn.fit(2 if stop is CancelFitException else 3, 1e-2)
    for (weights, _), start in zip(trained.seen, [o for o in started.seen if o][1:]): assert same(weights, start)
    assert same(state(learn), trained.seen[-1][1])

def test_predictions_within_a_validation_are_of_the_average(make):
    "And what comes after them is, too."
    validated, saved = FetchPredsCallback(), watch('after_epoch', lambda cb: {k for k in cb.learn.model.state_dict() if not k.startswith('average')})
    learn = make(cut=5)
    learn.fit(2, 1e-3, cbs=[EMACallback(0.8), validated, saved])
    torch.testing.assert_close(validated.preds[0], learn.get_preds()[0], atol=1e-6, rtol=0)
    assert not learn.model._state_dict_hooks and saved.seen[-1] == set(learn.model.state_dict())

def test_loaders_of_several_processes(make, monkeypatch):
    "`DistributedTrainer` puts its own loaders around the learner's."
    accelerate = ModuleType('accelerate')
    accelerate.Accelerator = type('Accelerator', (), dict(__init__=lambda self: None))
    monkeypatch.setitem(sys.modules, 'accelerate', accelerate)
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: t)
    learn = make(new_dls(), cut=5, cbs=[RecalibrateBN(1), Film(n=2)])
    learn.dls.loaders = [DistributedDL(o, 0, 1) for o in learn.dls.loaders]
    assert moved_by(learn, 1e-2) >= filters(learn) and len(learn.film.frames) == 2

def test_the_target_size_is_kept(make, tmp_path):
    "When it was changed, by a resizer that has none, and with grey images."
    learn = make(cut=5)
    learn.resizer.size = (24, 40)
    learn.save_pretrained(tmp_path/'m')
    assert ResizerClassifier.from_pretrained(tmp_path/'m')(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    for r in (ResizerClassifier.from_pretrained(tmp_path/'m').resizer, load_resizer(learn.save_resizer(tmp_path/'r'))): assert tuple(r.size) == (24, 40)
    learn = make(cut=5, resizer='none', size=48)
    learn.resizer = 'learned'
    assert tuple(learn.resizer(torch.zeros(1, 3, 64, 64)).shape[-2:]) == (48, 48)
    grey = ResizerClassifier('resnet18', 2, 'bilinear', 32, n_in=1, cut=5)
    learn = make(resizer=nn.Identity(), cut=5)
    learn.model = grey
    learn.resizer = 'learned'
    assert learn.resizer(torch.zeros(1, 1, 64, 64)).shape == (1, 1, 32, 32)

def test_frozen_parts_train_again_after_an_interruption(make):
    learn = make(cut=5)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=[Frozen('body'), Callback(before_step=ctrl_c)])
    assert moved_by(learn, 1e-2) >= filters(learn)

def test_recalibration_meets_the_other_callbacks(make):
    "It measures for the average where there is one, and leaves frozen parts as they are."
    def loss(*cbs):
        learn = make(new_dls(), cut=5)
        learn.dls.train.rng = random.Random(0)
        learn.fit(1, 3e-2, cbs=list(cbs))
        return learn.recorder.values[-1][1]
    assert loss(EMACallback(0.8), RecalibrateBN()) < loss(EMACallback(0.8))/2
    learn = make(cut=5)
    before = state(learn)
    learn.fit(1, 1e-2, cbs=[Frozen('body'), RecalibrateBN()])
    assert {k.split('.')[0] for k in moved(before, state(learn))} == {'resizer', 'head'}

def test_interrupted_recalibration_leaves_momentum_and_statistics(make):
    trained = watch('after_train', lambda cb: state(cb.learn))
    learn = make(cut=5, cbs=trained)
    at = learn.model.register_forward_hook(lambda m, *args: ctrl_c() if m.resizer.stem[-1].momentum is None else None)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=RecalibrateBN())
    at.remove()
    assert same(state(learn), trained.seen[0])
    assert {m.momentum for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {0.1}

def torch_dls(poison=False):
    data = [(torch.rand(3, 64, 64)/(0. if poison and i==7 else 1.), i % 3) for i in range(20)]
    dl = torch.utils.data.DataLoader(data, batch_size=10)
    return DataLoaders(dl, dl)

def test_callbacks_with_loaders_of_pytorch(make):
    learn = make(torch_dls(), n_out=3, cut=5, loss_func=CrossEntropyLossFlat(), cbs=[RecalibrateBN(1), EMACallback(0.8), FiniteLoss()])
    assert moved_by(learn, 1e-2) >= filters(learn)
    learn = make(torch_dls(poison=True), n_out=3, cut=5, loss_func=CrossEntropyLossFlat(), cbs=FiniteLoss())
    with pytest.raises(NonFiniteLoss, match='in batch 0 of epoch 0, in training: try') as e: learn.fit(1)
    assert list(e.value.files) == []

def poison(self): self.learn.loss_grad = self.loss*float('nan'); self.learn.loss = self.loss_grad.detach()

@pytest.mark.parametrize('cbs', [[GradientAccumulation(20)], [Autocast(torch.float16, init_scale=64.)], [MixUp()]], ids=['accumulation', 'float16', 'mixup'])
def test_a_loss_that_is_not_finite_meets_the_other_callbacks(cbs, make):
    "It stops at that batch, with the weights as they were."
    cb = Callback(after_loss=lambda self: poison(self) if self.training and self.iter == 1 else None)
    learn = make(cut=5, cbs=[FiniteLoss(), cb, *cbs])
    steps = watch('before_step', lambda o: o.iter, order=-50)
    with pytest.raises(NonFiniteLoss, match='in batch 1 of epoch 0, in training, with '): learn.fit(1, 1e-2, cbs=steps)
    assert 1 not in steps.seen and all(p.isfinite().all() for p in learn.model.parameters())

def test_lr_find_ends_at_a_loss_that_is_not_finite(make):
    "And the weights are those of before."
    cb = Callback(after_loss=lambda self: poison(self) if self.training and self.learn.opt.hypers[0]['lr'] > 1e-3 else None)
    learn = make(cut=5, cbs=[FiniteLoss(), cb])
    before = state(learn)
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None)
    assert same(before, state(learn)) and len(learn.recorder.losses) < 10

def test_another_resizer_has_to_fit(make):
    "Its channels are those the body takes; a name will do; a copy is taken; what config.json says brings it back."
    learn, other = make(arch='resnet18', cut=5), make(cut=5)
    with pytest.raises(ValueError, match='puts out 1 channels, and the body takes 3'): learn.resizer = Resizer(16, out_channels=1)
    learn.resizer = other.resizer
    assert learn.resizer is not other.resizer and same(learn.resizer.state_dict(), other.resizer.state_dict())
    for name in ('antialias', 'none', 'muller'):
        learn.resizer = name
        learn.save_pretrained(learn.path/name)
        assert type(ResizerClassifier.from_pretrained(learn.path/name).resizer) is type(learn.resizer)
    strange = Resizer(16)
    strange.mean, strange.std = [0.5]*3, None
    with pytest.warns(UserWarning, match='for this resizer it should be .*0.5'): learn.resizer = strange

class Odd(nn.Module):
    "A user's module with a `mean` of its own"
    def __init__(self, mean):
        super().__init__()
        self.mean = mean
    def forward(self, x): return F.avg_pool2d(x, 2)

@pytest.mark.parametrize('mean', [0.5, nn.Parameter(torch.zeros(3, 1, 1)), None], ids=['number', 'parameter', 'none'])
def test_a_module_may_have_a_mean_of_its_own(mean, make):
    assert make(resizer=Odd(mean), cut=5).get_preds()[0].shape == (20, 10)

@pytest.mark.parametrize('resizer', [nn.Flatten(), nn.Flatten(0), nn.AdaptiveMaxPool2d(8, return_indices=True)], ids=['2d', '1d', 'tuple'])
def test_what_is_no_resizer_is_refused(resizer, make):
    with pytest.raises(ValueError, match='a resizer maps'): make(resizer=resizer, cut=5)

def test_a_refused_save_leaves_what_was_there(make, tmp_path):
    learn = make(arch='resnet18', cut=5)
    learn.save_pretrained(tmp_path/'m')
    learn.resizer = Odd(None)
    with pytest.raises(ValueError, match='cannot hold resizer'): learn.save_pretrained(tmp_path/'m')
    ResizerClassifier.from_pretrained(tmp_path/'m')

def test_no_validation_images(make):
    "As with `vision_learner`."
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: image_files(get_path('sample'))[::40], get_y=parent_label,
                      splitter=IndexSplitter([]), item_tfms=Resize(64))
    learn = make(block.dataloaders('', bs=5, device='cpu'), cut=5)
    assert tuple(learn.model.read.size) == (64, 64)

def test_callbacks_find_a_wrapped_model(make):
    "As fastai's parallel trainers wrap it."
    class Wrap(Callback):
        order = -20
        def before_fit(self): self.learn.model = nn.DataParallel(self.model, device_ids=[])
        def after_fit(self): self.learn.model = self.model.module
    dtypes = []
    learn = make(cut=5, cbs=[Wrap(), Autocast(), ResizerLR(0.5), Frozen('head'), EMACallback(0.8), RecalibrateBN(1)])
    learn.model.body[0].register_forward_hook(lambda m, inp, out: dtypes.append(out.dtype))
    changed = moved_by(learn, 1e-2)
    assert changed >= filters(learn, 'resizer', 'body') and not changed & filters(learn, 'head') and set(dtypes) == {torch.bfloat16}

# ---------------------------------------------------------------- what once went wrong

def test_default_rate_may_be_a_slice(make):
    "`lr` of the learner spreads over the groups, as it does with fastai's optimizers."
    learn = make(lr=slice(1e-5, 1e-3), cut=5)
    learn.fit(1)
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-5, 1e-4, 1e-3])

def test_reduce_on_plateau(make):
    "The rate is cut when the metric stays, in PyTorch's optimizer."
    learn = make(cut=5, metrics=scripted(2, 1, 1, 1))
    learn.fit(3, 1e-2, cbs=ReduceLROnPlateau('score', patience=1))
    assert [g['lr'] for g in learn.opt.opt.param_groups] == pytest.approx([1e-4]*6)

@pytest.mark.parametrize('where', ['after_loss', 'before_step', 'after_batch'])
def test_an_interrupted_learner_is_back_in_float32(where, make):
    "The model itself, with no learner to reset it, computes in float32 after Ctrl-C."
    learn = make(cut=5, size=16, cbs=[Autocast(), Callback(**{where: ctrl_c})])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2)
    assert learn.model.eval()(torch.rand(1, 3, 64, 64)).dtype == torch.float32

def test_predict_of_a_model_for_grey_images(make, tmp_path):
    "It reads files as the `DataLoaders` did."
    learn = make(grey_dls(), arch='resnet18', n_in=1)
    learn.save_pretrained(tmp_path/'m')
    probs = ResizerClassifier.from_pretrained(tmp_path/'m').predict(list(learn.dls.valid_ds.items))[2]
    torch.testing.assert_close(probs, learn.get_preds()[0], atol=1e-3, rtol=0)

def test_named_weights_are_not_downloaded_again(make, tmp_path, monkeypatch):
    "`weights`, which `vision_learner` takes, is for training only."
    calls, start = [], resnet18().state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: calls.append(a) or start)
    make(arch='resnet18', weights='IMAGENET1K_V1', pretrained=True).save_pretrained(tmp_path/'m')
    ResizerClassifier.from_pretrained(tmp_path/'m')
    assert len(calls) == 1

@pytest.mark.parametrize('device', ['cpu', None])
def test_device_of_the_dataloaders(device, make):
    "A name of a device, or none, as fastai's `dataloaders` takes them."
    files = image_files(get_path('sample'))[::20]
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=parent_label, splitter=GrandparentSplitter(valid_name='val'), item_tfms=Resize(64))
    dls = block.dataloaders('', bs=10, device=device)
    assert make(dls, cut=5).get_preds()[0].shape == (len(dls.valid_ds), 10)

def test_loaders_of_pytorch(make):
    "As with `vision_learner`, whose loaders need no transforms."
    data = [(torch.rand(3, 64, 64), i % 3) for i in range(20)]
    dl = torch.utils.data.DataLoader(data, batch_size=10)
    learn = make(DataLoaders(dl, dl), n_out=3, cut=5, loss_func=CrossEntropyLossFlat())
    assert moved_by(learn, 1e-2) >= filters(learn)

def test_no_compiler_is_one_sentence(shell):
    "Training goes on as it is"
    res = shell('resizer_train', '--data', 'sample', '--limit', 20, '--arch', 'resnet18', '--size', 64, '--out', 32, '--bs', 10, '--epochs', 1, '--workers', 0, '--compile',
                CXX='/no/compiler', PYTHONWARNINGS='ignore,default::UserWarning:resizer_fastai.learner')
    assert res.returncode == 0 and res.stderr.count('UserWarning: the model is not compiled') == 1 and 'Traceback' not in res.stderr, res.stderr

@needs_compiler
def test_compile_in_place(make, tmp_path):
    "Copied and exported it is the plain model"
    learn = make(compile=True)
    assert learn.model._compiled_call_impl is not None and not any('_orig_mod' in k for k in learn.model.state_dict())
    assert deepcopy(learn.model)._compiled_call_impl is None
    learn.export(tmp_path/'model.pkl')
    assert load_learner(tmp_path/'model.pkl').model._compiled_call_impl is None

def tiny(pretrained=False): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

@needs_compiler
def test_compiled_training_is_the_same_training(make):
    "A whole fit, with a last batch of another size in validation"
    def losses(**kwargs):
        set_seed(0)
        learn = make(get_dls('sample', size=64, bs=10, limit=30, num_workers=0, device='cpu'), tiny, ps=0., opt_func=SGD, **kwargs)   # a compiled dropout draws other numbers
        set_seed(0)
        assert (learn.model._compiled_call_impl is not None) == bool(kwargs)
        learn.fit(2, 1e-4)   # at higher rates the last bits grow
        return tensor(learn.recorder.values)
    torch.testing.assert_close(losses(compile=True), losses(), atol=1e-4, rtol=1e-4)
