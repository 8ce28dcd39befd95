"Files from somebody else: models, resizers and runs that are broken on purpose are refused in one sentence, and run nothing."
import json, os, pickle, random, resource, shutil, time
from pathlib import Path
import pytest, torch
from fastai.vision.all import AdaptiveAvgPool, ConvLayer, Flatten, nn
from safetensors.torch import load_file, save_file
from conftest import needs_timm
from resizer_fastai import train
from resizer_fastai.compare import write_comparison
from resizer_fastai.data import ReadImage, draw_sample
from resizer_fastai.learner import ResizerClassifier, bodies
from resizer_fastai.resizer import load_resizer, make_resizer, save_resizer
from resizer_fastai.ship import model_card, resizer_export, resizer_predict
from resizer_fastai.train import load_run, resizer_train

small = dict(data='sample', limit=20, arch='squeezenet1_1', size=64, out=32, bs=10, num_workers=0, precision='fp32', epochs=1, name='run')

def tiny(pretrained=False): return nn.Sequential(ConvLayer(3, 8, stride=2), AdaptiveAvgPool(1), Flatten(), nn.Linear(8, 1))

@pytest.fixture
def tiny_body(monkeypatch): monkeypatch.setitem(bodies, 'tiny', tiny)

@pytest.fixture
def model(tiny_body, tmp_path):
    "The folder of a small model"
    m = ResizerClassifier('tiny', 3, 'learned', size=16, read=ReadImage(32), vocab=list('abc'), mean=[0.5]*3, std=[0.2]*3)
    m.save_pretrained(tmp_path/'model')
    return tmp_path/'model'

values = [None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.1, 1e300, float('nan'), float('inf'), 10**5, 10**9, 2**63, 10**30, '', 'a', 'abc',
          'learned', 'none', 'os.system', '/dev/zero', '../x', '\0', 'ä'*50, [], [1], [0, 0, 0], [1]*20, [10**9, 10**9], ['a']*3, [[]], {}, {'a': 1}]
keys = ['pretrained', 'weights', 'checkpoint_path', 'pretrained_cfg', 'custom_head', 'cut', 'lin_ftrs', 'ps', 'num_resblocks', 'num_kernels',
        'size', 'zero_init', 'y_range', 'img_size', 'drop_rate', 'pool', 'name', 'x']

def places(o):
    "Every dict and list in `o`, with each of its keys"
    for k, v in (o.items() if isinstance(o, dict) else enumerate(o)):
        yield o, k
        if isinstance(v, (dict, list)): yield from places(v)

def mutated(o, rng):
    "A copy of `o` with one to three values replaced, removed or added"
    o = json.loads(json.dumps(o))
    for _ in range(rng.randint(1, 3)):
        there, k = rng.choice(list(places(o)) or [(o, 0)])
        if rng.random()<0.2 and isinstance(there, dict): there[rng.choice(keys)] = rng.choice(values)
        elif rng.random()<0.15: del there[k]
        else: there[k] = rng.choice(values)
    return o

def refused_or_fine(load, file, *more):
    "Call `load`; it may raise ValueError that names `file`, and is quick and small"
    rss, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try: load()
    except ValueError as e: assert str(file) in str(e) and '\n' not in str(e), e
    else: more and more[0]()
    assert time.perf_counter()-start<5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-rss<500_000   # in kB
    return True

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_mutated_configs(model):
    config, rng = json.loads((model/'config.json').read_text()), random.Random(0)
    for _ in range(1000):
        (model/'config.json').write_text(json.dumps(mutated(config, rng)))
        refused_or_fine(lambda: ResizerClassifier.from_pretrained(model), model)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', ['', '[]', 'null', '{', '['*100_000, '{"a":'*100_000, '9'*5000, '"\\ud800"', '\ufeff{}', '{}'+' '*11_000_000], ids=range(10))
def test_configs_that_are_none(model, text):
    (model/'config.json').write_text(text)
    with pytest.raises(ValueError, match='config.json'): ResizerClassifier.from_pretrained(model)

def flipped(content, rng):
    "With some bytes changed, cut off, or repeated"
    content, kind = bytearray(content), rng.randint(0, 3)
    if kind==0: return bytes(content[:rng.randint(0, len(content))])
    if kind==1: return bytes(content+content[:rng.randint(1, 100)])
    at = rng.randint(0, 200) if kind==2 else rng.randint(0, len(content)-1)   # the header, or anywhere
    for i in range(at, min(at+rng.randint(1, 8), len(content))): content[i] = rng.randint(0, 255)
    return bytes(content)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_mutated_weights(model, tmp_path):
    file, rng = model/'model.safetensors', random.Random(0)
    alone = save_resizer(make_resizer('learned', 16), tmp_path/'resizer')
    whole, part = file.read_bytes(), alone.read_bytes()
    for _ in range(300):
        file.write_bytes(flipped(whole, rng))
        alone.write_bytes(flipped(part, rng))
        refused_or_fine(lambda: ResizerClassifier.from_pretrained(model), file)
        refused_or_fine(lambda: load_resizer(alone), alone)

def changed(**kwargs):
    def change(state): return state | {k: f(state[k]) for k, f in kwargs.items()}
    return change

first = 'body.0.0.weight'
tensors = dict(integer=changed(**{first: lambda o: o.int()}), boolean=changed(**{first: lambda o: o>0}), complex=changed(**{first: lambda o: o+0j}),
               nan=changed(**{first: lambda o: o*float('nan')}), counter=changed(**{'body.0.1.num_batches_tracked': lambda o: o.float()}),
               shape=changed(**{first: lambda o: o[:1].clone()}), lost=lambda state: {k: v for k, v in state.items() if k!=first},
               more=lambda state: state | dict(more=torch.ones(1)))

@pytest.mark.parametrize('name', tensors)
def test_weights_of_another_type_are_named(model, name):
    file = model/'model.safetensors'
    save_file(tensors[name](load_file(file)), file)
    key = dict(counter='num_batches_tracked', more='more').get(name, first)
    with pytest.raises(ValueError, match=f'model.safetensors cannot be used here: .*{key}'): ResizerClassifier.from_pretrained(model)

@pytest.mark.parametrize('key,value', [('std', [0.2, 0.2, 0]), ('std', [float('nan')]*3), ('mean', [0.5]*2), ('vocab', [1, 2, 3]), ('vocab', ['a']), ('vocab', 'abc'),
                                       ('input_size', [10**9]*2), ('n_out', 3*10**6), ('cut', 10**9), ('pretrained', True), ('activation', []),
                                       ('checkpoint_path', 'evil.pth')])
def test_config_that_does_not_fit_is_named(model, key, value):
    config = json.loads((model/'config.json').read_text())
    (model/'config.json').write_text(json.dumps(config | {key: value}))
    what = dict(n_out='for 3000000 outputs').get(key, key)
    with pytest.raises(ValueError, match=f'model/.* cannot be used here: .*{what}'): ResizerClassifier.from_pretrained(model)

@pytest.mark.parametrize('where', ['/dev/zero', 'fifo'])
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_only_regular_files_are_read(model, where, name):
    (model/name).unlink()
    if where=='fifo': os.mkfifo(model/name)
    else: (model/name).symlink_to(where)
    with pytest.raises(FileNotFoundError, match=f'no {name}'): ResizerClassifier.from_pretrained(model)

class Payload:
    def __reduce__(self): return os.mkdir, ('executed',)

@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'resizer.safetensors'])
def test_payload_in_a_model_is_refused_and_not_executed(model, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (model/name).write_bytes(pickle.dumps(Payload()))
    load = load_resizer if name=='resizer.safetensors' else ResizerClassifier.from_pretrained
    with pytest.raises(ValueError, match=name): load(model/name if load is load_resizer else model)
    assert not (tmp_path/'executed').exists()

@needs_timm
def test_config_cannot_make_timm_read_a_pickle(monkeypatch, tmp_path):
    "timm unpickles `checkpoint_path`"
    monkeypatch.chdir(tmp_path)
    ResizerClassifier('timm/resnet10t', 3, 'bilinear', size=32, input_size=64).save_pretrained('model')
    torch.save(Payload(), 'evil.pth')
    config = json.loads(Path('model/config.json').read_text())
    Path('model/config.json').write_text(json.dumps(config | dict(checkpoint_path='evil.pth')))
    with pytest.raises(ValueError, match='unknown key checkpoint_path'): ResizerClassifier.from_pretrained('model')
    assert not Path('executed').exists()

readers = dict(load_run=load_run, compare=lambda run: write_comparison(run.parent, 'learned'), model_card=lambda run: model_card(run, 'me/it'),
               predict=lambda run: resizer_predict(run, [run/'images/a.png']), export=lambda run: resizer_export(run, pt2=run.parent/'m.pt2'),
               resume=lambda run: resizer_train(**small, runs=run.parent, resume=True))

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run, and beside it one that was broken off at its end"
    root = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, 'save_pictures', lambda *args: None)
        resizer_train(**small, runs=root)
        m.setattr(train, 'finish_run', lambda *args: None)
        resizer_train(**small | dict(epochs=2, name='begun'), runs=root)
    (root/'run/images').mkdir()
    draw_sample(0, 0).save(root/'run/images/a.png')
    return root

names = ['run.json', 'metrics.csv', 'preds.npz', 'model/config.json', 'model/model.safetensors', 'resizer.safetensors', 'images/a.png', 'report.html']

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', names)
def test_payload_in_any_file_of_a_run_is_not_executed(finished, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished/'run', tmp_path/'runs/run')
    run, refused = tmp_path/'runs/run', []
    (run/name).write_bytes(pickle.dumps(Payload()))
    for k, f in readers.items():
        try: f(run)
        except (ValueError, OSError) as e:
            assert len(str(e).splitlines())==1 and (name in str(e) or 'could not be read' in str(e)), e
            refused.append(k)
    assert not (tmp_path/'executed').exists()
    assert refused or name in ('metrics.csv', 'resizer.safetensors', 'report.html')

@pytest.mark.parametrize('name', ['last', 'previous'])
def test_payload_in_a_checkpoint_is_not_executed(finished, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished/'begun', tmp_path/'begun')
    for o in ('last', name): torch.save(dict(model=Payload()), tmp_path/'begun/checkpoint'/f'{o}.pth')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, 'finish_run', lambda *args: None)
        if name=='last': resizer_train(**small | dict(epochs=2, name='begun'), runs=tmp_path, resume=True)
        else:
            with pytest.raises(ValueError, match='previous.pth cannot be read'): resizer_train(**small | dict(epochs=2, name='begun'), runs=tmp_path, resume=True)
    assert not (tmp_path/'executed').exists()
