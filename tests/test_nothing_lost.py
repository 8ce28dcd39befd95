"A full disk, a damaged file, other images, Ctrl-C: nothing is lost, and one sentence says what to do."
import json, os, random, re, resource, shlex, signal, subprocess, sys, time
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from conftest import make_images
from resizer_fastai import data, train
from resizer_fastai.data import check_images, command_parser, whole_file, write_json
from resizer_fastai.train import command_of, load_run, read_run, resizer_train, train_options

small = dict(data='sample', limit=20, arch='squeezenet1_1', size=64, out=32, bs=10, num_workers=0, precision='fp32', epochs=1)

@pytest.fixture
def run(monkeypatch, tmp_path):
    "Train in `tmp_path`/run, without pictures"
    monkeypatch.setattr(train, 'save_pictures', lambda *args: None)
    return lambda **kwargs: resizer_train(**small | dict(runs=tmp_path, name='run') | kwargs).path

def stopped(run, monkeypatch, where='finish_run', error=KeyboardInterrupt, **kwargs):
    "A run that `error` stops at `where`"
    def stop(*args): raise error
    with monkeypatch.context() as m:
        m.setattr(train, where, stop)
        with pytest.raises(error): run(**kwargs)

def weights(path): return (path/'model'/'model.safetensors').read_bytes()

# Commands that are printed

text = st.text(st.characters(blacklist_categories=['Cs', 'Cc', 'Zl', 'Zp']), min_size=1)

@settings(deadline=None, max_examples=200)
@given(data=text, resizer=text, lr=st.floats(1e-9, 1e9), size=st.tuples(st.integers(1, 999), st.integers(1, 999)), flip=st.booleans(), name=text)
def test_printed_command_comes_back(data, resizer, lr, size, flip, name):
    o = dict(data=data, resizer=resizer, lr=lr, size=size, flip=flip, name=name, pretrained=not flip)
    command = command_of(o)
    assert len(command.splitlines())==1
    parsed = vars(command_parser(resizer_train).parse_args(shlex.split(command)[1:]))
    assert {k: parsed[k] for k in o} == o | dict(size='x'.join(map(str, size)))

@pytest.mark.parametrize('bad', ['a\nb', 'a\r', '\x85', 'x\u2028y', '\n'])
def test_value_with_a_line_break_is_refused(bad):
    with pytest.raises(ValueError, match='name must not have a line break'): command_of(dict(name=bad))

# A full disk

def limited(n_bytes, f):
    "Call `f` in a process that may not write larger files; its exit status, with 3 for an OSError that is printed"
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        try: f()
        except OSError as e:
            print(e, flush=True)
            os._exit(3)
        os._exit(0)
    p = get_context('fork').Process(target=child)
    p.start()
    p.join()
    return p.exitcode

@pytest.mark.slow
@pytest.mark.parametrize('n_bytes,file', [(300_000, 'model.safetensors'), (9_000_000, 'last.pth')])
def test_disk_that_is_full(run, tmp_path, capfd, monkeypatch, n_bytes, file):
    "While the model, or a checkpoint, is written; the run goes on to the same weights once there is room"
    if file=='model.safetensors': stopped(run, monkeypatch)   # only the end is left to do
    assert limited(n_bytes, lambda: run(epochs=1, resume=True))==3
    assert re.search(rf'cannot write .*{file}, which takes [0-9,]+ bytes: .*File too large', capfd.readouterr().out)
    assert not [o for o in (tmp_path/'run').rglob('.*')] and read_run(tmp_path/'run')['metrics'] is None
    run(resume=True)
    assert weights(tmp_path/'run') == weights(run(name='whole'))

def test_resuming_needs_no_room(run, tmp_path, monkeypatch):
    "Before the next checkpoint"
    stopped(run, monkeypatch, epochs=2)
    monkeypatch.setattr(data.os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    reached = []
    monkeypatch.setattr(train, 'fit_recipe', lambda learn, o, done: reached.append(done))
    monkeypatch.setattr(train, 'finish_run', lambda *args: None)
    run(epochs=2, resume=True)
    assert reached==[2]

@pytest.mark.slow
@pytest.mark.parametrize('where', ['preds.npz', 'report.html', 'curves.png', 'config.json', 'resizer.safetensors'])
def test_end_that_cannot_be_written_is_written_later(tmp_path, monkeypatch, where):
    real = whole_file
    def full(file, *args):
        if Path(file).name==where: raise OSError(f'cannot write {file}: No space left on device')
        return real(file, *args)
    for module in list(sys.modules.values()):
        if getattr(module, '__name__', '').startswith('resizer_fastai.') and hasattr(module, 'whole_file'): monkeypatch.setattr(module, 'whole_file', full)
    def run(): return resizer_train(**small, runs=tmp_path, name='run', resume=True).path
    with pytest.raises(OSError, match=f'cannot write .*{where}'): run()
    assert read_run(tmp_path/'run')['metrics'] is None and (tmp_path/'run/checkpoint/last.pth').exists()
    monkeypatch.undo()
    assert read_run(run())['metrics']

def test_whole_file_leaves_special_files_and_links(tmp_path):
    (tmp_path/'there.json').write_text('1')
    (tmp_path/'link.json').symlink_to('there.json')
    write_json(tmp_path/'link.json', [2])
    assert (tmp_path/'link.json').is_symlink() and json.loads((tmp_path/'there.json').read_text())==[2]
    write_json('/dev/null', [2])
    assert Path('/dev/null').is_char_device()

# A cache that cannot be written

def test_training_and_check_go_on_without_a_cache(run, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').touch()
    monkeypatch.setenv('RESIZER_CACHE', str(tmp_path/'file'/'cache'))
    monkeypatch.setattr(data, '_memos', {})
    photos = make_images(tmp_path/'photos', [f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'ab' for i in range(3)])
    run(data=photos, limit=None, bs=3)
    assert capsys.readouterr().out.count('note: the next run will read all images again')==1
    with pytest.raises(OSError): run(data=photos, limit=None, bs=3, cache='disk', name='cached')

def test_full_cache_keeps_no_part_of_a_check(tmp_path, monkeypatch, capsys):
    cache = tmp_path/'cache'
    monkeypatch.setenv('RESIZER_CACHE', str(cache))
    monkeypatch.setattr(data, '_memos', {})
    def full(file, content):
        open(file, 'wb').write(content[:3])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    files = [make_images(tmp_path, ['a/0.png'])/'a/0.png']
    for _ in range(2): assert check_images(files).problem.tolist()==['']
    assert not list(cache.iterdir()) and capsys.readouterr().out.count('note: ')==1

# A run folder that is damaged

@pytest.fixture
def broken_off(run, tmp_path, monkeypatch):
    "A run of two epochs that was stopped at its end, and the weights that it comes to"
    whole = run(epochs=2, name='whole')
    stopped(run, monkeypatch, epochs=2)
    return tmp_path/'run', weights(whole)

def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 255
    file.write_bytes(content)

damages = dict(flipped=lambda f: flip(f, f.stat().st_size//2), cut=lambda f: f.write_bytes(f.read_bytes()[:-1000]), empty=lambda f: f.write_bytes(b''),
               other=lambda f: torch.save(dict(model=3), f), list=lambda f: torch.save([1], f), lost=lambda f: f.unlink())

@pytest.mark.parametrize('damage', [o if o in ('flipped','lost') else pytest.param(o, marks=pytest.mark.slow) for o in damages])
def test_damaged_checkpoint_is_replaced_by_the_one_before(broken_off, run, capsys, damage):
    path, want = broken_off
    damages[damage](path/'checkpoint'/'last.pth')
    run(epochs=2, resume=True)
    assert 'last.pth is damaged or lost: going on from the one before' in capsys.readouterr().out and weights(path)==want

def test_two_damaged_checkpoints_are_named(broken_off, run):
    path, _ = broken_off
    for o in ('last', 'previous'): flip(path/'checkpoint'/f'{o}.pth', 5000)
    with pytest.raises(ValueError, match='last.pth cannot be read.*; .*previous.pth cannot be read.*: start the run again with --overwrite'): run(epochs=2, resume=True)

wrong = [None, True, -1, 10**12, 0.5, 'a', '', [], [1], {}, {'a': 1}]

def damaged(o, rng):
    "A copy with one value of another kind, or without one"
    o = json.loads(json.dumps(o))
    there = rng.choice([o, o['args'], o['data'], o['metrics']])
    k = rng.choice(list(there))
    if rng.random()<0.3: del there[k]
    else: there[k] = rng.choice([v for v in wrong if type(v) is not type(there[k])])
    return o

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_damaged_run_json(run):
    "Resumed, loaded and compared: a ValueError or FileNotFoundError of one line, or all is well"
    path = run()
    good, rng = json.loads((path/'run.json').read_text()), random.Random(0)
    texts = ['', '{', '[]', 'null', '{}'] + [json.dumps(damaged(good, rng)) for _ in range(60)]
    for text in texts:
        (path/'run.json').write_text(text)
        for f in (lambda: run(resume=True), lambda: load_run(path), lambda: read_run(path, finished=True)):
            try: f()
            except (ValueError, FileNotFoundError) as e: assert len(str(e).splitlines())==1 and len(str(e))<700, text

# Data that changed

def test_changed_images_are_noticed_when_a_run_is_resumed(run, tmp_path, monkeypatch):
    "The same names and sizes"
    photos = make_images(tmp_path/'photos', [f'{s}/{c}/{i}.bmp' for s in ('train', 'val') for c in 'ab' for i in range(3)])
    args = dict(data=photos, limit=None, bs=3)
    stopped(run, monkeypatch, **args)
    file = photos/'train/a/1.bmp'
    size = file.stat().st_size
    Image.fromarray(255-np.asarray(Image.open(file))).save(file)
    assert file.stat().st_size==size
    with pytest.raises(ValueError, match='are not those that .*run was started with: start it again with --overwrite'): run(resume=True, **args)
    assert read_run(run(overwrite=True, **args))['metrics']

# Stopped from outside

def process(*args, cwd, name='resizer_train'):
    env = os.environ | dict(PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    return subprocess.Popen([Path(sys.executable).parent/name, *args], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)

@pytest.mark.slow
@pytest.mark.parametrize('sent,status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_process_says_how_to_go_on(tmp_path, sent, status):
    args = [f'--{k}={v}' for k, v in (small | dict(epochs=500, name='my run', num_workers=1)).items()]
    p = process(*args, cwd=tmp_path)
    while not (tmp_path/'runs/my run/checkpoint/last.pth').exists() and p.poll() is None: time.sleep(0.05)
    p.send_signal(sent)
    start = time.time()
    out, err = p.communicate(timeout=60)
    assert p.returncode==status and time.time()-start<30 and 'Traceback' not in err
    again = re.search('stopped; to go on: (.*)', err)[1]
    p = process(*shlex.split(again)[1:], cwd=tmp_path)
    for line in p.stdout:
        if 'resuming after' in line: break
    else: raise AssertionError(p.stderr.read())
    p.terminate()
    p.communicate()

def test_stopped_run_prints_the_command(run, monkeypatch, capsys):
    stopped(run, monkeypatch)
    again = re.search('stopped; to go on: (.*)', capsys.readouterr().err)[1]
    parsed = command_parser(resizer_train).parse_args(shlex.split(again)[1:])
    assert read_run(resizer_train(**vars(parsed)).path)['metrics'] and parsed.resume

def test_first_signal_waits_for_the_batch_and_the_second_does_not(tmp_path, monkeypatch):
    def main(**kwargs): resizer_train.main([f'--{k}={v}' for k, v in (small | kwargs).items()])
    class Signals(Callback):
        n, order, seen = 1, train.Checkpoint.order+1, ()
        def before_batch(self):
            self.seen = 'before',
            for _ in range(self.n): os.kill(os.getpid(), signal.SIGTERM)
            self.seen += 'after',
        def after_step(self): self.seen += 'step',
    real, sent = train.run_learner, Signals()
    monkeypatch.setattr(train, 'run_learner', lambda *args, cbs, **kwargs: real(*args, cbs=[*cbs, sent], **kwargs))
    monkeypatch.setattr(train, 'finish_run', lambda *args: pytest.fail('not stopped'))
    monkeypatch.chdir(tmp_path)
    for sent.n, name, seen in ((1, 'once', ('before', 'after', 'step')), (2, 'twice', ('before',))):
        with pytest.raises(SystemExit) as e: main(name=name)
        assert e.value.code==143 and sent.seen==seen

def test_out_of_memory_names_a_batch_size(run, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
    monkeypatch.setattr(train, 'fit_recipe', full)
    with pytest.raises(ValueError, match='no memory for batches of 10 images: try --bs 5'): run()
