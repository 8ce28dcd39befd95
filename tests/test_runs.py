"Runs that are interrupted go on as if they had not been, and arms differ in nothing but the resizer."
import gc, json, os, platform, shutil, signal, subprocess, sys, time, weakref
from copy import deepcopy
from pathlib import Path
from types import ModuleType
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback, Optimizer, first, plt, risinstance, set_seed
from conftest import make_images, needs_timm
from resizer_fastai import __version__, compare, train
from resizer_fastai.data import NormalizeInPlace, UsageError, get_path
from resizer_fastai.learner import Autocast, FiniteLoss, FusedAdamW, ResizerClassifier
from resizer_fastai.show import Film, resized_views
from resizer_fastai.train import Checkpoint, MetricsLog, finish_run, fit_recipe, read_run, recipe_learner, resizer_train

small = dict(data='sample', limit=20, arch='resnet18', size=64, out=32, bs=10, workers=0)
exact = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'lr']

def metrics(path): return pd.read_csv(path/'metrics.csv')[exact].values.tolist()

def flags(**kwargs): return [o for k, v in kwargs.items() for o in (f'--{k}', str(v))]

def no_pictures_of(monkeypatch):
    "Runs as they are but for the pictures of their reports, which take most of the time of a small run"
    monkeypatch.setattr(train, 'save_pictures', lambda *args: None)

@pytest.fixture
def no_pictures(monkeypatch): no_pictures_of(monkeypatch)

def test_a_comparison_that_is_killed_goes_on(tmp_path):
    "Finished cells stay, the one that was killed goes on from its last whole epoch, and ends where it would have ended"
    command = [Path(sys.executable).parent/'resizer_compare', *flags(arms='bilinear,learned', epochs=4, name='c', runs=tmp_path, **small | dict(workers=1))]
    cell = tmp_path/'c'/'sample-resnet18-learned-0'
    env = os.environ | dict(PYTHONWARNINGS='ignore')
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, start_new_session=True) as p:
        for _ in range(1200):
            if (cell/'checkpoint'/'last.pth').exists() or p.poll() is not None: break
            time.sleep(0.05)
        os.killpg(p.pid, signal.SIGKILL)
    assert len(metrics(cell)) < 4 and not (cell/'report.html').exists()
    done = (tmp_path/'c'/'sample-resnet18-bilinear-0'/'run.json').stat().st_mtime_ns
    res = subprocess.run(command, capture_output=True, text=True, env=env)
    assert res.returncode == 0, res.stderr
    assert 'sample-resnet18-bilinear-0: finished before' in res.stdout and 'going on after' in res.stdout
    assert (tmp_path/'c'/'sample-resnet18-bilinear-0'/'run.json').stat().st_mtime_ns == done
    whole = resizer_train(**small | dict(workers=1), epochs=4, seed=0, runs=tmp_path).path
    assert metrics(cell) == metrics(whole)
    assert (np.load(cell/'preds.npz')['probs'] == np.load(whole/'preds.npz')['probs']).all()
    assert sorted(p.name for p in cell.iterdir()) == sorted(p.name for p in whole.iterdir())

class Stop(Callback):
    "Break off in the epoch `at`"
    order = FiniteLoss.order
    def __init__(self, at): self.at = at
    def after_loss(self):
        if self.training and len(self.metrics_log.rows) == self.at: raise KeyboardInterrupt

def learner(path, *cbs, **kwargs):
    learn = recipe_learner('sample', 'resnet18', size=64, out=32, limit=20, bs=10, num_workers=0, path=path, cbs=[MetricsLog(), Checkpoint(), Film(n=1), *cbs], **kwargs)
    path.mkdir(exist_ok=True)
    return learn

def fit(learn, pretrained, done=0, schedule='one_cycle'):
    "Three epochs"
    set_seed(3)
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, 2 if pretrained else 3, 1e-3, pretrained, done, schedule)

@pytest.mark.parametrize('pretrained,at,ema,opt,schedule', [
    (False, 1, None, 'adamw', 'one_cycle'), (False, 2, None, 'adamw', 'one_cycle'), (True, 1, None, 'adamw', 'one_cycle'), (True, 2, None, 'adamw', 'one_cycle'),
    (False, 2, 0.9, 'adamw', 'flat_cos'), (True, 1, 0.9, 'adamw', 'one_cycle'), (False, 2, None, 'sgd', 'steps'), (False, 2, None, 'ranger', 'flat_cos'),
    pytest.param(False, 2, None, 'muon', 'flat_cos', marks=needs_timm)])
def test_any_epoch_of_either_recipe(tmp_path, pretrained, at, ema, opt, schedule):
    "`fine_tune`, too: after its frozen epoch, and after the first open one; an average of the weights goes on as well, and any schedule"
    def made(name, *cbs): return learner(tmp_path/name, *cbs, ema=ema, opt=opt)
    whole, broken = made('whole'), made('broken', Stop(at))
    fit(whole, pretrained, schedule=schedule)
    with pytest.raises(KeyboardInterrupt): fit(broken, pretrained, schedule=schedule)
    again = made('broken')
    done = again.checkpoint.load()
    assert done == at
    fit(again, pretrained, done, schedule)
    assert metrics(tmp_path/'broken') == metrics(tmp_path/'whole') and len(metrics(tmp_path/'whole')) == 3
    for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True): assert torch.equal(a, b)

class Scaled(Autocast):
    "Gradients are scaled as for float16; the network runs in float32, as convolutions in float16 take hundreds of times as long on some CPUs"
    def before_batch(self): pass

@pytest.mark.parametrize('pretrained,at', [(False, 2), (True, 1), (True, 2)])
def test_the_scale_of_gradients_goes_on(tmp_path, monkeypatch, pretrained, at):
    "As float16 has it: too large at first, it is halved at step after step, and the fit after the frozen epoch begins with one of its own"
    monkeypatch.setattr(train, 'precision_cbs', lambda *args: [Scaled(torch.float16, init_scale=2.**120)])
    whole, broken = learner(tmp_path/'whole'), learner(tmp_path/'broken', Stop(at))
    fit(whole, pretrained)
    with pytest.raises(KeyboardInterrupt): fit(broken, pretrained)
    again = learner(tmp_path/'broken')
    fit(again, pretrained, again.checkpoint.load())
    assert metrics(tmp_path/'broken') == metrics(tmp_path/'whole')
    scale = torch.load(whole.checkpoint.file, weights_only=False)['scaler']['scale']
    assert 2.**116 < scale < 2.**120   # some of the last four steps halved it and others did not, so that one begun anew takes other steps

@pytest.mark.parametrize('optim', [None, ModuleType('timm.optim')])
def test_muon_wants_timm(tmp_path, monkeypatch, optim):
    "Where it is missing, or too old to have muon, a run says so before anything is made"
    monkeypatch.setitem(sys.modules, 'timm.optim', optim)
    with pytest.raises(UsageError, match='muon needs timm 1.0.21 or newer'): resizer_train(**small, opt='muon', runs=tmp_path)
    assert not list(tmp_path.iterdir())

@needs_timm
@pytest.mark.parametrize('uses', [dict(opt='muon'), dict(arch='timm/resnet18')])
def test_timm_is_part_of_a_run_that_uses_it(monkeypatch, uses):
    def made(options): return json.loads(json.dumps(dict(args=options, versions=train.depends_on(options))))
    args, plain = compare.complete_options(**small | uses), compare.complete_options(**small)
    run, other = made(args), made(plain)
    monkeypatch.setattr(train.metadata, 'version', lambda name: f'another {name}')
    assert train.changed_since(run, args) == [f'timm {run["versions"]["timm"]}, now another timm'] and not train.changed_since(other, plain)

def stop_after_the_last_epoch(monkeypatch, args):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, 'finish_run', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        resizer_train(**args)

def test_a_checkpoint_that_cannot_be_read(tmp_path, monkeypatch, no_pictures):
    "By a broken disk: it is named, and the run begins anew without it"
    args = small | dict(epochs=1, runs=tmp_path, name='r')
    stop_after_the_last_epoch(monkeypatch, args)
    file = tmp_path/'r'/'checkpoint'/'last.pth'
    for broken in (file.read_bytes()[:10_000], b'', b'x'):
        file.write_bytes(broken)
        with pytest.raises(UsageError, match='last.pth cannot be read, remove it and the run begins anew: .+') as e: resizer_train(**args, resume=True)
        assert '\n' not in str(e.value)
    file.unlink()
    assert len(metrics(resizer_train(**args, resume=True).path)) == 1

def test_the_old_checkpoint_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    l = learner(tmp_path/'a')
    with l.no_bar(), l.no_logging(): l.fit(1)
    before = l.checkpoint.file.read_bytes()
    def half(s, f): f.write(b'half'); raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', half)
    with l.no_bar(), l.no_logging(), pytest.raises(OSError, match='No space'): l.fit(1)
    assert l.checkpoint.file.read_bytes() == before

@pytest.mark.parametrize('ema', [None, 0.9])
def test_interrupted_after_training(tmp_path, monkeypatch, ema):
    "A run without its report is not finished; taken up again it trains no more, and says what it said, of its memory and devices as well"
    def stop(*args): raise KeyboardInterrupt
    def machine(m, name, peak):
        m.setattr(train, 'device_name', lambda _: name)
        m.setattr(train, '_peak_memory', lambda _: peak)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        machine(m, 'one', 2e9)
        m.setattr(train, 'save_pictures', stop)
        resizer_train(**small, epochs=1, ema=ema, runs=tmp_path)
    path = tmp_path/'sample-resnet18-learned-42'
    before, said = metrics(path), np.load(path/'preds.npz')['probs']
    assert (path/'checkpoint'/'last.pth').exists()
    machine(monkeypatch, 'another', 1e9)
    resizer_train(**small, epochs=1, ema=ema, runs=tmp_path, resume=True)
    assert metrics(path) == before and (path/'report.html').exists() and not (path/'checkpoint').exists()
    assert (np.load(path/'preds.npz')['probs'] == said).all()
    run = read_run(path)
    assert run['device'] == 'one, then another' and run['metrics']['peak_memory'] == 2e9

def test_start_from_another_run(tmp_path, monkeypatch, capsys, no_pictures):
    "Body, head and normalisation are those of the run of the same seed, the resizer is new; so for every arm of a comparison"
    with monkeypatch.context() as m:
        m.setattr(train, 'plain_head', {})   # fastai's head, as after fine_tune
        bases = [resizer_train(**small | dict(resizer='bilinear'), epochs=1, seed=o, runs=tmp_path/'base') for o in (0, 1)]
    for b in bases:
        config = b.path/'model'/'config.json'
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(mean=[0.5]*3)))
    args = small | dict(start=str(tmp_path/'base'/'sample-resnet18-bilinear-{seed}'))
    for seed, b in enumerate(bases):
        learn = recipe_learner(**train._recipe_options(args | dict(seed=seed)))
        for part in ('body', 'head'):
            for x, y in zip(getattr(learn.model, part).state_dict().values(), getattr(b.model, part).state_dict().values(), strict=True): assert torch.equal(x, y)
        assert (learn.model.mean == 0.5).all() and first(learn.dls.train.after_batch.fs, risinstance(NormalizeInPlace)).mean.unique() == 0.5
    compare.resizer_compare(arms='bilinear,learned', seeds='0,1', **args, dry_run=True)
    assert capsys.readouterr().out.count("--start '"+args['start']+"'") == 4
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(vocab=list('abcdefghij'))))
    with pytest.raises(UsageError, match='has other classes: a, b'): recipe_learner(**train._recipe_options(args | dict(seed=1)))

def test_what_was_trained_on_is_not_validated_on(tmp_path, no_pictures):
    "A run cannot start from one that was trained on images which it is validated on"
    data = make_images(tmp_path/'data', [f'{c}/{i}.png' for c in 'ab' for i in range(10)])
    def args(name, **kwargs): return small | dict(data=data, limit=None, bs=4, valid_pct=0.5, epochs=1, runs=tmp_path, name=name) | kwargs
    whole, part = [resizer_train(**args(f'base-{o}', tune=o), resizer='bilinear').path for o in (False, True)]
    for o, says in (dict(start=whole, tune=True), 'was trained on images that tune validates on'), (dict(start=whole, data=f'{data}/', valid_pct=0.3), 'was trained with valid_pct 0.5, .* with 0.3'):
        with pytest.raises(UsageError, match=says): resizer_train(**args('r', **o))
        with pytest.raises(UsageError, match=says): compare.resizer_compare('bilinear,learned', **args('c', **o))
    assert not (tmp_path/'r').exists() and not (tmp_path/'c').exists()
    for tune in (True, False): assert set(resizer_train(**args(f'r-{tune}', start=part, tune=tune)).dls.valid_ds.items).isdisjoint(train.load_run(part).dls.train_ds.items)

def test_the_run_to_start_from_is_trained_anew(tmp_path, capsys, no_pictures):
    "What had started from it is run afresh, and what was brought together from both is no comparison"
    def base(lr): return resizer_train(**small | dict(resizer='bilinear'), epochs=1, lr=lr, runs=tmp_path/'base').path
    def cells(arms, name, **kwargs): return compare.resizer_compare(arms=arms, **small, epochs=1, start=str(start), runs=tmp_path, name=name, **kwargs)
    start = base(3e-3)
    cells('bilinear', 'c')
    shutil.copytree(tmp_path/'c', tmp_path/'both')
    shutil.rmtree(start)
    base(1e-5)
    capsys.readouterr()
    cells('bilinear,muller', 'c')
    said = capsys.readouterr().out
    assert 'was started with start_weights' in said and 'sample-resnet18-bilinear-0.old-1 and run afresh' in said
    shutil.copytree(tmp_path/'c'/'sample-resnet18-muller-0', tmp_path/'both'/'sample-resnet18-muller-0')
    with pytest.raises(UsageError, match='sample-resnet18-muller-0 starts from other weights than sample-resnet18-bilinear-0'): cells('bilinear', 'both', collect=True)
    shutil.rmtree(start)
    assert list(cells('bilinear', 'c', collect=True).arm) == ['bilinear', 'muller']

def test_what_cannot_go_on(tmp_path, capsys, monkeypatch, no_pictures):
    "Other options, other images, another precision; a run that is finished says so and is left alone"
    data = make_images(tmp_path/'data', [f'{c}/{i}.png' for c in 'ab' for i in range(6)])
    args = small | dict(data=data, limit=None, valid_pct=0.5, epochs=1, runs=tmp_path/'runs', name='r')
    path = resizer_train(**args).path
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
    again = resizer_train(**args, resume=True)
    assert 'finished before' in capsys.readouterr().out and {p: p.stat().st_mtime_ns for p in path.rglob('*')} == stamps
    assert again.path == path
    assert resizer_train(**args | dict(data=f'{tmp_path}/./data/'), resume=True).path == path   # the same folder
    with pytest.raises(UsageError, match='was started with epochs 1, now 2; lr 0.003, now 0.001'): resizer_train(**args | dict(epochs=2, lr=1e-3), resume=True)
    (path/'checkpoint').mkdir()
    resizer_train(**args, resume=True)   # killed while its checkpoint was removed
    assert {p: p.stat().st_mtime_ns for p in path.rglob('*') if p.is_file()} == {p: t for p, t in stamps.items() if p.is_file()}
    (path/'checkpoint'/'last.pth').touch()
    precision = read_run(path)['precision']
    monkeypatch.setattr(train, 'pick_precision', lambda *args: 'another one')
    with pytest.raises(UsageError, match=f'was started in {precision}, and would go on in another one'): resizer_train(**args, resume=True)
    make_images(data, ['a/9.png'])
    with pytest.raises(UsageError, match='images of .* have changed'): resizer_train(**args, resume=True)
    with pytest.warns(UserWarning, match='have changed since .* was made: it may be validated on'): train.load_run(path)
    make_images(data, ['aa/0.png', 'aa/1.png'])
    with pytest.raises(UsageError, match='has other classes than .*: a, b; a, aa, b'): train.load_run(path)

def test_settings_are_part_of_the_run(tmp_path, monkeypatch, no_pictures):
    "Arguments of the resizer, its rate, clipping, how the body begins, a split to choose them on: in the command, in the training, and when the run is taken up again"
    begins = []
    monkeypatch.setattr(train, 'fit_recipe', lambda learn, *args: (begins.append(deepcopy(learn.model.body)), fit_recipe(learn, *args)))
    learn = resizer_train(**small | dict(resizer='learned+num_kernels=8+zero_init=1', limit=50), lr_mult=0.5, clip=1., eps=1e-7, body_init='identity', tune=True, epochs=1, runs=tmp_path)
    command = (learn.path/'run.json').read_text()
    for o in ("--resizer learned+num_kernels=8+zero_init=1", '--lr_mult 0.5', '--clip 1.0', '--eps 1e-07', '--body_init identity', '--tune'): assert o in command
    assert not any(m.weight.any() for n, m in begins[0].named_modules() if n.endswith('bn2')) and all(m.weight.any() for n, m in learn.model.body.named_modules() if n.endswith('bn2'))
    assert learn.model.resizer.num_kernels == 8 and learn.model.resizer.zero_init and learn.resizer_lr.mult == 0.5 and learn.gradient_clip.max_norm == 1 and {h['eps'] for h in learn.opt.hypers} == {1e-7}
    assert all(f.parent.parent.name == 'train' for f in learn.dls.valid_ds.items) and set(np.load(learn.path/'preds.npz')['names']) == {f.relative_to(get_path('sample')).as_posix() for f in learn.dls.valid_ds.items}
    again = train.load_run(learn.path)
    assert again.dls.valid_ds.items == learn.dls.valid_ds.items and again.resizer.num_kernels == 8

@pytest.fixture
def library(tmp_path, monkeypatch):
    "A copy of the library's files, of which the fingerprint is taken"
    path = shutil.copytree(Path(train.__file__).parent, tmp_path/'library')
    monkeypatch.setattr(train, 'files', lambda _: path)
    yield path
    train.code_fingerprint.cache_clear()

def test_other_code_makes_another_run(tmp_path, library, capsys, no_pictures):
    "A change in any module that training depends on; the run of before is named and kept"
    args = small | dict(arms='bilinear', epochs=1, runs=tmp_path, name='c')
    def changed(module):
        with open(library/f'{module}.py', 'a') as f: f.write('\n')
        train.code_fingerprint.cache_clear()
        return train.code_fingerprint()
    def said():
        compare.resizer_compare(**args)
        return capsys.readouterr().out
    said()
    seen = [train.code_fingerprint(), *map(changed, ('show', 'compare', 'bench'))]
    assert len(set(seen)) == 1 and 'finished before' in said()
    seen = [*seen[:1], *map(changed, ('data', 'resizer', 'learner', 'train'))]
    assert len(set(seen)) == 5
    name = 'sample-resnet18-bilinear-0'
    assert f'{name}: was started with resizer_fastai {__version__}+{seen[0]}, now {__version__}+{seen[-1]}; moved to {name}.old-1 and run afresh' in said()
    assert [read_run(tmp_path/'c'/o)['versions']['resizer_fastai'].split('+')[1] for o in (f'{name}.old-1', name)] == [seen[0], seen[-1]]

def test_arms_with_arguments(tmp_path, no_pictures):
    df = compare.resizer_compare(arms='bilinear,learned+num_kernels=4,learned', **small | dict(epochs=1), runs=tmp_path, name='c')
    assert list(df.arm) == ['bilinear', 'learned+num_kernels=4', 'learned'] and 0 < df.parameters[1] < df.parameters[2]
    with pytest.raises(UsageError, match="no argument 'kernels'"): compare.resizer_compare(arms='learned+kernels=4', **small, runs=tmp_path)

def made(arm, **kwargs):
    "The model of an arm and its batches in two epochs"
    o = compare.cell_options(arm, 5)
    learn = recipe_learner('sample', 'resnet18', o['resizer'], size=64, out=32, seed=o['seed'], limit=20, bs=10, num_workers=0, **kwargs)
    set_seed(o['seed'])
    return learn.model, [b for _ in range(2) for b in learn.dls.train]

@pytest.mark.parametrize('arm', [o for o in compare.arm_names if o not in ('bilinear', 'again')])
def test_arms_differ_in_the_resizer_only(arm):
    "Same bytes: body and head, labels and order of two epochs, and, at the same size, the augmented images"
    (a, batches_a), (b, batches_b) = made(arm), made('bilinear')
    for part in ('body', 'head'):
        for x, y in zip(getattr(a, part).state_dict().values(), getattr(b, part).state_dict().values(), strict=True): assert torch.equal(x, y)
    for (x, s), (y, t) in zip(batches_a, batches_b, strict=True): assert torch.equal(s, t) and (arm == 'pil' or torch.equal(x, y))

def test_arms_have_a_body_drawn_anew_in_common():
    "By what comes in, and whatever the resizer has drawn before"
    a, b = [made(o, body_init='fan_in')[0].body for o in ('learned', 'bilinear')]
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True): assert torch.equal(x, y)
    assert abs(a[0].weight.std()/(2/147)**0.5 - 1) < 0.05

def test_again_is_bilinear_with_other_draws():
    (a, _), (b, _) = made('again'), made('bilinear')
    assert type(a.resizer) is type(b.resizer) and not torch.equal(a.body[0].weight, b.body[0].weight)

def test_collect_takes_what_is_there_and_nothing_else(tmp_path, monkeypatch, no_pictures):
    "Unfinished and replaced runs are left out; runs with other options are an error that names them"
    args = small | dict(epochs=1, runs=tmp_path, name='c')
    compare.resizer_compare(arms='bilinear,learned', seeds='1', **args)
    resizer_train(**small, epochs=1, seed=0, runs=tmp_path/'c')   # learned
    root = tmp_path/'c'
    (root/'sample-resnet18-none-0').mkdir()
    (root/'sample-resnet18-none-0'/'run.json').write_text('{"args": {"data": "sample", "resizer": "none", "seed": 0}, "versions": {}, "metrics": null}')
    side_by_side = []
    monkeypatch.setattr(compare, 'compare_runs', lambda a, b: side_by_side.extend([a.name, b.name]) or plt.figure())
    df = compare.resizer_compare(**args, collect=True)
    assert df[['arm', 'seeds']].values.tolist() == [['bilinear', 1], ['learned', 2]] and df.pairs[1] == 1
    (root/'sample-resnet18-learned-0').rename(root/'photos.old-2-resnet18-learned-0')
    (root/'sample-resnet18-learned-1').rename(root/'sample-resnet18-learned-1.old-1')
    assert compare.resizer_compare(**args, collect=True).seeds.tolist() == [1, 1]
    (root/'sample-resnet18-learned-1.old-1').rename(root/'sample-resnet18-learned-1')
    (root/'photos.old-2-resnet18-learned-0').rename(root/'sample-resnet18-learned-0')
    assert side_by_side == ['sample-resnet18-learned-1', 'sample-resnet18-bilinear-1']
    shutil.copytree(root/'sample-resnet18-learned-1', root/'sample-resnet18-learned-2024')
    file = root/'sample-resnet18-learned-2024'/'run.json'
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 2024'))
    with pytest.raises(UsageError, match='from 0 to 999: got sample-resnet18-learned-2024'): compare.resizer_compare(**args, collect=True)
    shutil.rmtree(file.parent)
    resizer_train(**small, epochs=2, seed=2, runs=root)
    with pytest.raises(UsageError, match='sample-resnet18-learned-2 has other options than'): compare.resizer_compare(**args, collect=True)
    with pytest.raises(UsageError, match='no finished run'): compare.resizer_compare(**args | dict(name='none'), collect=True)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A learned and a bilinear run on the same images"
    root = tmp_path_factory.mktemp('two')
    with pytest.MonkeyPatch.context() as m:
        no_pictures_of(m)
        return [resizer_train(**small | dict(resizer=o), epochs=2, runs=root).path for o in ('learned', 'bilinear')]

def test_two_runs_image_by_image(two):
    "Each image that one gets right and the other wrong, with its own input and what each resizer makes of it"
    df = compare.disagreements(*two)
    preds = [np.load(o/'preds.npz') for o in two]
    right = [dict(zip(p['names'], p['probs'].argmax(1) == p['targets'])) for p in preds]
    assert set(df.file) == {f for f in right[0] if right[0][f] != right[1][f]} and len(df)
    for r in df.itertuples(): assert right['ab'.index(r.right)][r.file]
    fig = compare.compare_runs(*two, n=1)
    row = df.sort_values('right', kind='stable').iloc[0]   # those that only `a` gets right come first
    file = get_path('sample')/row.file
    for ax, k, path in zip(fig.axes, ('input', 'resized', 'resized'), (two[0], *two)):
        model = ResizerClassifier.from_pretrained(path/'model')
        views = resized_views(model, model.read_batch(file))
        drawn = np.array(ax.images[0].get_array())
        if k == 'input': np.testing.assert_allclose(drawn, views[k][0].permute(1, 2, 0), atol=1e-4)
        else: assert np.corrcoef(drawn.ravel(), views[k][0].permute(1, 2, 0).numpy().ravel())[0, 1] > 0.9
    assert [o.get_title().split('\n')[0] for o in fig.axes[:3]] == ['input', *[o.name for o in two]]

def test_the_last_epoch_counts(tmp_path, monkeypatch, no_pictures):
    "In the run and in the table, though an earlier one was better"
    def finish(learn, *args):
        learn.metrics_log.rows[0].update(accuracy=1.)
        finish_run(learn, *args)
    monkeypatch.setattr(train, 'finish_run', finish)
    df = compare.resizer_compare(arms='bilinear', **small | dict(epochs=2), runs=tmp_path, name='c')
    preds = np.load(tmp_path/'c'/'sample-resnet18-bilinear-0'/'preds.npz')
    assert df.accuracy[0] == pytest.approx(100*(preds['probs'].argmax(1) == preds['targets']).mean()) and df.accuracy[0] < 100

def test_a_pause_makes_no_epoch_longer(two, tmp_path):
    "In what is said of a difference; all seconds are in the table"
    cells = {arm: [shutil.copytree(p, tmp_path/p.name)] for arm, p in zip(('learned', 'bilinear'), two)}
    for (path,), seconds in zip(cells.values(), ([2, 4, 900], [2, 2, 1])):
        pd.DataFrame(dict(epoch=range(3), seconds=seconds, accuracy=0.5)).to_csv(path/'metrics.csv', index=False)
    learned, bilinear = compare.results_table(cells, 'bilinear').itertuples()
    assert 'an epoch takes 2.0 times as long' in compare.explain_difference(learned, bilinear, 20) and learned.seconds == read_run(two[0])['metrics']['seconds']

def test_dots_are_of_the_last_epoch(two):
    fig = compare.plot_runs(dict(learned=two[:1], bilinear=two[1:]))
    for dots, path in zip(fig.axes[1].collections, two, strict=True):
        m = pd.read_csv(path/'metrics.csv')
        np.testing.assert_allclose(dots.get_offsets()[0], [m.seconds.sum(), 100*m.accuracy.iloc[-1]])

def test_runs_of_other_images_are_not_compared(two, tmp_path, no_pictures):
    "The same names of files do not make the same images"
    for d, size in (('p', 40), ('q', 44)): make_images(tmp_path/d, [f'{c}/{i}.png' for c in 'ab' for i in range(6)], (size, size))
    p, q = [resizer_train(**small | dict(data=tmp_path/d, limit=None, valid_pct=0.5), epochs=1, runs=tmp_path/'runs', name=d).path for d in 'pq']
    for other in (two[0], q):
        with pytest.raises(UsageError, match='have other validation images'): compare.compare_runs(p, other)

def test_a_folder_that_another_process_has_begun(tmp_path, monkeypatch):
    "While this one was reading images: it is left alone"
    real,theirs = train.recipe_learner,'{"args": {"data": "sample", "resizer": "none", "seed": 0}, "versions": {}, "metrics": null}'
    def meanwhile(**kwargs):
        (tmp_path/'r').mkdir()
        (tmp_path/'r'/'run.json').write_text(theirs)
        return real(**kwargs)
    monkeypatch.setattr(train, 'recipe_learner', meanwhile)
    with pytest.raises(UsageError, match='r has been started by another process'): resizer_train(**small, epochs=1, name='r', runs=tmp_path)
    assert (tmp_path/'r'/'run.json').read_text() == theirs and [o.name for o in tmp_path.iterdir()] == ['r']

def test_a_run_that_another_process_has_finished(tmp_path, monkeypatch, no_pictures):
    "While this one was reading images: it is left alone"
    path = resizer_train(**small, epochs=1, runs=tmp_path).path
    checkpoint = path/'checkpoint'/'last.pth'
    checkpoint.parent.mkdir()
    checkpoint.touch()
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob('*') if p.is_file() and p != checkpoint}
    real = train.recipe_learner
    def meanwhile(**kwargs):
        checkpoint.unlink()
        return real(**kwargs)
    monkeypatch.setattr(train, 'recipe_learner', meanwhile)
    with pytest.raises(UsageError, match='has been finished by another process'): resizer_train(**small, epochs=1, runs=tmp_path, resume=True)
    assert {p: p.stat().st_mtime_ns for p in path.rglob('*') if p.is_file()} == stamps

def test_a_run_is_on_the_disk_before_its_checkpoint_goes_and_stays_as_it_is(tmp_path, monkeypatch, no_pictures):
    "Whatever its learner does next"
    synced, missed, rmtree = set(), [], shutil.rmtree
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.add(os.fstat(fd).st_ino))
    def remove(folder, *args, **kwargs):
        if folder.name == 'checkpoint': missed.extend(p.name for p in [folder.parent, *folder.parent.rglob('*')] if p.stat().st_ino not in synced)
        return rmtree(folder, *args, **kwargs)
    monkeypatch.setattr(shutil, 'rmtree', remove)
    learn = resizer_train(**small, epochs=1, runs=tmp_path)
    path = tmp_path/'sample-resnet18-learned-42'
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
    assert missed == [] and path/'preds.npz' in stamps and not (path/'checkpoint').exists()
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.fit(1)
    assert {p: p.stat().st_mtime_ns for p in path.rglob('*')} == stamps

def test_runs_are_brought_together_without_their_models(tmp_path, no_pictures):
    "What a table needs of a cell is small: run.json, metrics.csv and preds.npz"
    args = small | dict(arms='bilinear,learned', epochs=1, runs=tmp_path, name='c')
    df = compare.resizer_compare(**args)
    for o in (tmp_path/'c').glob('sample-*'):
        shutil.rmtree(o/'model')
    (tmp_path/'c'/'report.html').unlink()
    again = compare.resizer_compare(**args, collect=True)
    assert again.equals(df) and (tmp_path/'c'/'report.html').exists()

@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_memory_is_kept_for_the_next_layer():
    "What one layer frees the next one gets, without a fault a page"
    code = """
import resource, sys, torch
from resizer_fastai.train import keep_memory
if sys.argv[1] == 'kept': keep_memory()
def layer(): torch.empty(2**24).fill_(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-before
print(sorted(faults() for _ in range(9))[4])   # now and then one has to grow the heap
"""
    faults = {o: int(subprocess.run([sys.executable, '-W', 'ignore', '-c', code, o], capture_output=True, text=True).stdout) for o in ('kept', 'as it is')}
    assert faults['kept'] < faults['as it is']/10

def test_the_peak_of_memory_is_that_of_the_run(tmp_path, no_pictures):
    "Not of a larger one before it in the same process, although freed memory is kept"
    def peak(**kwargs): return read_run(resizer_train(**small | kwargs, epochs=1, runs=tmp_path).path)['metrics']['peak_memory']
    large = peak(resizer='none', size=320, bs=20)
    if large is None: pytest.skip('this system does not tell')
    assert peak(resizer='bilinear') < large-200e6

def test_a_run_begins_when_the_one_before_is_gone(tmp_path, no_pictures, monkeypatch):
    "Or a GPU would hold the model and the images of both"
    gc.disable()
    try:
        before = weakref.ref(resizer_train(**small, epochs=1, runs=tmp_path).model)
        alive, make = [], train.recipe_learner
        def recorded(*args, **kwargs):
            alive.append(before() is not None)
            return make(*args, **kwargs)
        monkeypatch.setattr(train, 'recipe_learner', recorded)
        resizer_train(**small, epochs=1, seed=1, runs=tmp_path)
    finally: gc.enable()
    assert alive == [False]

def test_an_empty_folder_is_no_run(tmp_path, no_pictures):
    "A power cut may have left one, or a kill one with half a run.json"
    cell = tmp_path/'cells'/'sample-resnet18-bilinear-0'
    cell.mkdir(parents=True)
    (cell/'.run.json.1').write_text('{"args')
    path = compare.run_cell(tmp_path/'cells', **small | dict(resizer='bilinear', seed=0, epochs=1))
    assert path == cell and read_run(path)['metrics']['epoch'] == 0 and not [*path.glob('.*')]

def test_a_table_of_epochs_that_was_lost(tmp_path, no_pictures, monkeypatch):
    "By a power cut, with all epochs in the checkpoint"
    args = small | dict(epochs=2, runs=tmp_path, name='r')
    stop_after_the_last_epoch(monkeypatch, args)
    before = metrics(tmp_path/'r')
    (tmp_path/'r'/'metrics.csv').write_text('')
    assert metrics(resizer_train(**args, resume=True).path) == before and len(before) == 2

def test_a_mistake_costs_no_cell(tmp_path, no_pictures):
    "Options that make no sense, or a folder that is not there: said before anything is moved or trained"
    args = small | dict(arms='bilinear', epochs=1, runs=tmp_path, name='c')
    compare.resizer_compare(**args)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'c').rglob('*')}
    for o in (dict(bs=0), dict(precision='fp8'), dict(cache='x'), dict(limit=0), dict(opt='x'), dict(noisy=3), dict(workers=-1), dict(ema=2.), dict(start='nowhere'), dict(lr=-1.), dict(lr=float('nan')),
              dict(clip=-1.), dict(lr_mult=-1.), dict(epochs=0), dict(arms='learned,bilinear+kernels=4'), dict(arms='learned,learned+kernels=4'), dict(arms='learned', start=tmp_path/'{seed}'),
              dict(arms='learned,muller+kernel_size=4'), dict(arms='learned,muller+sigma=0'), dict(arms='learned,learned+num_resblocks=-1'), dict(arms='learned,learned+num_kernels=0'),
              dict(arms='learned,learned+skip_mode=unshuffle+out_channels=12', out=20), dict(arms='none,learned', arch='squeezenet1_1', out=4), dict(seed=3), dict(resizer='none'), dict(epoch=3)):
        with pytest.raises(UsageError): compare.resizer_compare(**args | o)
        assert {p: p.stat().st_mtime_ns for p in (tmp_path/'c').rglob('*')} == stamps, o
    with pytest.raises(UsageError, match='epochs is 1 or more'): compare.resizer_compare(**args | dict(epochs=0), dry_run=True)
    compare.resizer_compare(**args | dict(precision='fp16'), dry_run=True)   # may be printed for another machine

def test_cells_of_other_images_are_not_compared(tmp_path, no_pictures):
    "and not trained either"
    data = make_images(tmp_path/'data', [f'{c}/{i}.png' for c in 'ab' for i in range(8)])
    args = small | dict(data=data, limit=None, valid_pct=0.5, epochs=1, runs=tmp_path/'runs', name='c')
    compare.resizer_compare(arms='bilinear', **args)
    make_images(data, ['a/9.png', 'b/9.png'])
    with pytest.raises(UsageError, match='learned-0 has other images than data-resnet18-bilinear-0'): compare.resizer_compare(arms='bilinear,learned', **args)
    assert not (tmp_path/'runs'/'c'/'data-resnet18-learned-0').exists()
    compare.resizer_compare(arms='learned', **args)
    with pytest.raises(UsageError, match='has other images than'): compare.resizer_compare(arms='bilinear,learned', **args)

def test_broken_cells_are_named(tmp_path, no_pictures):
    args = small | dict(epochs=1, runs=tmp_path, name='c')
    compare.resizer_compare(arms='bilinear,learned', **args)
    cell = tmp_path/'c'/'sample-resnet18-learned-0'
    for name, broken in [('preds.npz', b''), ('preds.npz', b'PK'), ('preds.npz', b'x'), ('metrics.csv', b''), ('metrics.csv', b'epo'), ('run.json', b'{}'), ('run.json', b'[]'), ('run.json', b'{"args": {}, "versions": {}, "metrics": {}}'), ('run.json', b'{')]:
        whole = (cell/name).read_bytes()
        (cell/name).write_bytes(broken)
        for how in (dict(collect=True), dict(arms='bilinear,learned')):
            with pytest.raises(UsageError, match=f'{cell.name}.*({name}.*cannot be read|is no run of)'): compare.resizer_compare(**args | how)
        (cell/name).write_bytes(whole)
    shutil.copytree(cell, cell.with_name('copy'))
    with pytest.raises(UsageError, match=f'copy and {cell.name} are one cell, learned with seed 0'): compare.resizer_compare(**args, collect=True)

def test_parts_of_the_speed_are_turned_off(tmp_path, no_pictures):
    "Each by its option, which the command of the run tells"
    learn = resizer_train(**small, epochs=1, runs=tmp_path, channels_last=False, keep_memory=False, opt='adam',
                          resizer='learned+recompute=0+inplace=0+halve=0+subpixel=0')
    resizer = learn.model.resizer
    assert not (resizer.recompute or resizer.resize.halve or resizer.out.subpixel or any(m.inplace for m in resizer.modules() if isinstance(m, torch.nn.LeakyReLU)))
    assert learn.model.body[0].weight.is_contiguous() and type(learn.opt) is Optimizer
    command = read_run(learn.path)['command']
    for o in ('--no-channels_last', '--no-keep_memory', '--opt adam'): assert o in command
    usual = resizer_train(**small, epochs=1, runs=tmp_path, name='usual')
    assert not usual.model.body[0].weight.is_contiguous() and type(usual.opt) is FusedAdamW and '--no-' not in read_run(usual.path)['command']
