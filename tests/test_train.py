"Runs that are interrupted go on as if they had not been, and nothing in a run folder can run."
import os, pickle, shlex, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import needs_timm
from fastai.vision.all import Callback, default_split, model_meta, set_seed, squeezenet1_1
from resizer_fastai import train
from resizer_fastai.data import command_parser, draw_sample
from resizer_fastai.learner import FiniteLoss, bodies
from resizer_fastai.resizer import resizers
from resizer_fastai.show import Film
from resizer_fastai.train import (Checkpoint, MetricsLog, fit_recipe, load_run, read_run, resizer_train, run_learner,
                                  train_options)

small = dict(data='sample', limit=20, arch='squeezenet1_1', size=64, out=32, bs=10, num_workers=0, precision='fp32')

def flags(**kwargs): return [o for k, v in kwargs.items() for o in (f'--{k}', str(v))]

def metrics(path): return pd.read_csv(path/'metrics.csv').drop(columns='seconds').values.tolist()

def weights(path): return (path/'model'/'model.safetensors').read_bytes()

@pytest.fixture
def no_pictures(monkeypatch): monkeypatch.setattr(train, 'save_pictures', lambda *args: None)

@pytest.fixture
def quick(no_pictures, tmp_path):
    "A run of one epoch without pictures"
    return lambda **kwargs: resizer_train(**dict(small, epochs=1, runs=tmp_path) | kwargs)

def process(*args, cwd): return subprocess.Popen([Path(sys.executable).parent/'resizer_train', *map(str, args)], cwd=cwd, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | dict(PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1'))

@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path):
    "SIGKILL after the first checkpoint"
    args = flags(epochs=4, **small)
    whole, broken = process(*args, '--name', 'whole', cwd=tmp_path), process(*args, '--name', 'broken', cwd=tmp_path)
    while not (tmp_path/'runs/broken/checkpoint/last.pth').exists() and broken.poll() is None: time.sleep(0.02)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert len(metrics(tmp_path/'runs/broken')) < 4 and read_run(tmp_path/'runs/broken')['metrics'] is None
    out, err = process(*args, '--name', 'broken', '--resume', cwd=tmp_path).communicate(timeout=300)
    assert 'resuming after' in out, err
    assert whole.wait(300) == 0
    a, b = tmp_path/'runs/whole', tmp_path/'runs/broken'
    assert weights(a) == weights(b) and metrics(a) == metrics(b)
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())

@pytest.mark.slow
def test_two_processes_of_one_name(tmp_path):
    args = flags(epochs=2, name='one', **small)
    both = [process(*args, cwd=tmp_path) for _ in range(2)]
    errors = [p.communicate(timeout=300)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2]
    assert 'is being trained by another process' in ''.join(errors)
    assert read_run(tmp_path/'runs/one')['metrics'] and len(metrics(tmp_path/'runs/one')) == 2

class Stop(Callback):
    "Ctrl-C in the epoch `at`"
    order = FiniteLoss.order
    def __init__(self, at): self.at = at
    def after_loss(self):
        if self.training and len(self.metrics_log.rows) == self.at: raise KeyboardInterrupt

def epochs(path, *cbs, **kwargs):
    "Train two or three epochs in `path`, or go on there"
    o = train_options(**small | kwargs, epochs=2 if kwargs.get('pretrained') else 3)
    learn = run_learner(o, path, [MetricsLog(), Checkpoint(), Film(), *cbs])
    path.mkdir(exist_ok=True)
    done = learn.checkpoint.load()
    set_seed(3)
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, o, done)
    return learn

@pytest.mark.parametrize('at,kwargs', [
    (1, {}), (1, dict(pretrained=True, arch='fake')), (2, dict(pretrained=True, arch='fake')), (2, dict(opt='sgd', schedule='steps')),
    pytest.param(2, dict(recipe='muon'), marks=[needs_timm, pytest.mark.slow])], ids=str)
def test_resume_after_any_epoch_of_any_recipe(tmp_path, monkeypatch, at, kwargs):
    "`fine_tune` after its frozen epoch and after its first open one, too"
    monkeypatch.setitem(bodies, 'fake', lambda pretrained=True: squeezenet1_1())
    whole = epochs(tmp_path/'whole', **kwargs)
    with pytest.raises(KeyboardInterrupt): epochs(tmp_path/'broken', Stop(at), **kwargs)
    resumed = epochs(tmp_path/'broken', **kwargs)
    assert metrics(tmp_path/'broken') == metrics(tmp_path/'whole') and len(metrics(tmp_path/'whole')) == 3
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert torch.equal(torch.stack(resumed.film.frames), torch.stack(whole.film.frames))

def interrupted(run, monkeypatch, where, **kwargs):
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, where, stop)
        run(**kwargs)

@pytest.mark.parametrize('where', ['finish_run', 'run_report'])
def test_run_interrupted_while_it_is_finished(quick, monkeypatch, tmp_path, where):
    whole = quick(name='whole').path
    interrupted(quick, monkeypatch, where, name='broken')
    quick(name='broken', resume=True)
    assert weights(tmp_path/'broken') == weights(whole) and not (tmp_path/'broken'/'checkpoint').exists()

def test_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    "A disk that is full, say"
    write, files = Path.write_bytes, []
    def half(file, content):
        files.append(file)
        if not file.name.endswith('last.pth') or len(files) < 4: return write(file, content)
        write(file, content[:100])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', half)
    with pytest.raises(OSError, match='cannot write .*last.pth, which takes [0-9,]+ bytes: No space left on device'): epochs(tmp_path/'run')
    assert [o.name for o in (tmp_path/'run/checkpoint').iterdir()] == ['last.pth']
    monkeypatch.undo()
    assert metrics(epochs(tmp_path/'run').path) == metrics(epochs(tmp_path/'whole').path)

class Payload:
    def __reduce__(self): return os.mkdir, ('executed',)

@pytest.mark.parametrize('content', [pickle.dumps(Payload()), b'', b'PK'], ids=['payload', 'empty', 'cut'])
def test_checkpoint_that_is_none_is_refused_and_not_executed(quick, monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    interrupted(quick, monkeypatch, 'finish_run', name='run')
    (tmp_path/'run'/'checkpoint'/'last.pth').write_bytes(content)
    with pytest.raises(ValueError, match='last.pth cannot be read.*: start the run again with --overwrite'): quick(name='run', resume=True)
    assert not (tmp_path/'executed').exists()

def test_payload_in_a_zip_checkpoint_is_refused(quick, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    interrupted(quick, monkeypatch, 'finish_run', name='run')
    torch.save(dict(model=Payload()), tmp_path/'run'/'checkpoint'/'last.pth')
    with pytest.raises(ValueError, match='cannot be read'): quick(name='run', resume=True)
    assert not (tmp_path/'executed').exists()

def test_run_of_the_same_name(quick, tmp_path):
    run = quick(name='one').path
    first = (run/'run.json').stat().st_mtime_ns
    assert quick(name='one', num_workers=1, cache='disk').path == run   # they change no result
    assert (run/'run.json').stat().st_mtime_ns == first
    with pytest.raises(ValueError, match='was started with lr 0.003, now 0.01: give the run another --name, or --overwrite it'): quick(name='one', lr=0.01)
    assert read_run(quick(name='one', lr=0.01, overwrite=True).path)['args']['lr'] == 0.01
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.txt').write_text('mine')
    with pytest.raises(ValueError, match='is no run of resizer_fastai'): quick(name='photos', overwrite=True)
    assert (tmp_path/'photos'/'a.txt').exists()

def test_unfinished_run_wants_resume(quick, monkeypatch, tmp_path):
    interrupted(quick, monkeypatch, 'finish_run', name='run')
    with pytest.raises(ValueError, match='is not finished: continue with --resume, or start again with --overwrite'): quick(name='run')

@pytest.mark.parametrize('flip', [True, False])
def test_command_in_run_json_makes_the_same_run(quick, flip):
    run = read_run(quick(name='one', size='64x48', flip=flip, seed=7).path)
    parsed = command_parser(resizer_train).parse_args(shlex.split(run['command'])[1:])
    assert train_options(**vars(parsed)) == run['args']

@pytest.mark.slow
def test_module_registers_a_resizer(tmp_path):
    (tmp_path/'mine.py').write_text('from functools import partial\nfrom resizer_fastai.all import *\n'
                                    "resizers['tiny'] = partial(Resizer, num_kernels=2, num_resblocks=0)")
    args = flags(epochs=1, resizer='tiny', **small)
    p = process(*args, cwd=tmp_path)
    assert "no resizer 'tiny'" in p.communicate(timeout=120)[1] and p.returncode == 2
    p = process(*args, '--module', 'mine', cwd=tmp_path)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    run = read_run(tmp_path/'runs'/'sample-squeezenet1_1-tiny-42')
    assert run['parameters']['resizer'] < 1000 and '--module=mine' in run['command']

class Forgetful(torch.nn.Identity):
    "It does not keep its size"
    def __init__(self, size): super().__init__()

@pytest.mark.parametrize('resizer,says', [
    (Forgetful, 'cannot be saved without its attribute size'), (torch.nn.ReLU, "makes no resizer of size=32: .*unexpected keyword argument 'size'"),
    (partial(resizers['muller'], num_layers=3), "'num_layers': 2"), (torch.nn.Identity(), 'makes no resizer')], ids=['forgetful', 'without size', 'changed', 'instance'])
def test_resizer_that_would_fail_after_training_is_refused_before_it(quick, monkeypatch, tmp_path, resizer, says):
    monkeypatch.setitem(resizers, 'mine', resizers['muller'])
    if 'num_layers' in says: quick(name='run', resizer='mine')
    monkeypatch.setitem(resizers, 'mine', resizer)
    with pytest.raises(ValueError, match=says): quick(name='run', resizer='mine')
    assert (tmp_path/'run').exists() == ('num_layers' in says)

def test_resumed_run_of_a_resizer_with_other_layers_is_refused(quick, monkeypatch):
    "Its arguments are the same"
    class Mine(torch.nn.Conv2d):
        kernel = 3
        def __init__(self, size): super().__init__(3, 3, self.kernel, padding='same'); self.size = size
    monkeypatch.setitem(resizers, 'mine', Mine)
    interrupted(quick, monkeypatch, 'finish_run', name='run', resizer='mine')
    Mine.kernel = 5
    with pytest.raises(ValueError, match='last.pth cannot be read, or is of another model'): quick(name='run', resizer='mine', resume=True)

def test_load_run_gives_the_predictions_that_were_written(quick):
    path = quick(resizer='bilinear').path
    learn = load_run(path)
    with learn.no_bar(): preds, _ = learn.get_preds()
    np.testing.assert_allclose(preds, np.load(path/'preds.npz')['probs'], atol=1e-4)

def test_pretrained_run_is_loaded_and_started_from_with_its_own_statistics_and_head(quick, monkeypatch):
    def fake(pretrained=True): return squeezenet1_1()
    monkeypatch.setitem(bodies, 'fake', fake)
    monkeypatch.setitem(model_meta, fake, dict(cut=None, split=default_split, stats=([0.5]*3, [0.25]*3)))
    path = quick(arch='fake', resizer='bilinear', pretrained=True).path
    for learn in (load_run(path), run_learner(train_options(**small | dict(arch='fake', resizer='muller', init_from=path)))):
        assert learn.dls.after_batch.fs[-1].mean.flatten().tolist() == [0.5]*3
        with learn.no_bar(): preds, _ = learn.get_preds()
        np.testing.assert_allclose(preds, np.load(path/'preds.npz')['probs'], atol=1e-4)

def test_init_from_refuses_another_body_split_or_classes(quick, tmp_path):
    data = dict(data=folder(tmp_path/'data', n=8)/'train', limit=None)
    base = quick(name='base', valid_pct=0.25, **data).path
    for kwargs, says in ((dict(arch='squeezenet1_0'), 'has the body squeezenet1_1'), (dict(valid_pct=0.5), 'trained with valid_pct 0.25')):
        with pytest.raises(ValueError, match=says): quick(name='new', init_from=base, **dict(valid_pct=0.25) | data | kwargs)
    assert not (tmp_path/'new').exists()

def test_recipe_is_overridden_by_single_options():
    o = train_options(recipe='muon', lr=1e-2)
    assert (o.opt, o.schedule, o.lr) == ('muon', 'flat_cos', 1e-2)
    with pytest.raises(ValueError, match='leave recipe, schedule and init_from out'): train_options(recipe='muon', pretrained=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'workers'"): train_options(workers=3)

def test_resizers_see_the_same_batches_and_bodies():
    def first_batch(resizer):
        learn = run_learner(train_options(**small | dict(resizer=resizer)))
        set_seed(0)
        return learn.dls.one_batch()[0], [p.detach() for p in learn.model.body.parameters()]
    (x, body), *others = map(first_batch, ('bilinear', 'learned', 'muller', 'none', 'blurred'))
    for x2, body2 in others:
        assert torch.equal(x, x2)
        for a, b in zip(body, body2, strict=True): assert torch.equal(a, b)

def folder(root, n=4):
    for split in ('train', 'val'):
        for c in range(2):
            for i in range(n):
                (root/split/f'c{c}').mkdir(parents=True, exist_ok=True)
                draw_sample(c, i, 40).save(root/split/f'c{c}'/f'{i}.png')
    return root

def test_data_folder_is_only_read_and_bad_files_are_named(quick, tmp_path, capsys):
    data = folder(tmp_path/'data')
    (data/'train'/'c0'/'bad.png').write_bytes(b'no image')
    before = {p: p.stat().st_mtime_ns for p in data.rglob('*')}
    run = quick(data=data, limit=None, runs=tmp_path/'runs').path
    assert {p: p.stat().st_mtime_ns for p in data.rglob('*')} == before
    assert 'c0/bad.png' in capsys.readouterr().out and 'bad.png' in (run/'left_out.csv').read_text()
    with pytest.raises(ValueError, match='is inside the data folder'): quick(data=data, limit=None, runs=data)

def test_loss_that_is_not_finite_stops_the_run(quick, tmp_path):
    with pytest.raises(FloatingPointError, match='^the loss is .* in batch'): quick(lr=1e30, name='hot', epochs=2, opt='sgd')
    assert read_run(tmp_path/'hot')['metrics'] is None

def test_last_epoch_counts(quick, monkeypatch):
    "Even if the first one was better"
    finish = train.finish_run
    def better_before(learn, run):
        learn.metrics_log.rows[0]['accuracy'] = 1.
        finish(learn, run)
    monkeypatch.setattr(train, 'finish_run', better_before)
    run = quick(epochs=2).path
    preds = np.load(run/'preds.npz')
    assert (preds['probs'].argmax(1) == preds['targets']).mean() == pytest.approx(read_run(run)['metrics']['accuracy'])
