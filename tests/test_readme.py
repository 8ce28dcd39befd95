"README's blocks run, on fewer images and for one epoch; its numbers are those of results/; it stays short."
import re, shlex
from importlib.util import find_spec
import pytest
from conftest import make_images, repo
from fastai.vision.all import plt, resnet18
from resizer_fastai.learner import bodies

readme = (repo/'README.md').read_text()
blocks = re.findall(r'```(\w*)\n(.*?)```', readme, flags=re.DOTALL)
commands = [o for kind, block in blocks if not kind for o in block.splitlines() if o.startswith('resizer_')]

@pytest.mark.slow
def test_python_block_runs(tmp_path, monkeypatch):
    code, = [block for kind, block in blocks if kind == 'python']
    small = code.replace('bs=25', 'bs=5, limit=10, num_workers=0').replace('fit_one_cycle(6', 'fit_one_cycle(1')
    assert small.count('limit=10') == small.count('fit_one_cycle(1') == 1
    monkeypatch.chdir(tmp_path)
    exec(small, {})
    plt.close('all')
    assert (tmp_path/'my_model'/'model.safetensors').exists()

@pytest.mark.slow
@pytest.mark.parametrize('line', commands)
def test_command_runs(command, line, tmp_path, monkeypatch):
    "Nothing is downloaded: `photos` are drawn, and the pretrained body is none"
    if 'muon' in line and not find_spec('timm'): pytest.skip('no timm')
    make_images(tmp_path/'photos', [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(10)])
    if 'my_model' in line: return ship(command, line, tmp_path)
    if '--pretrained' in line: monkeypatch.setitem(bodies, 'resnet18', lambda pretrained=True: resnet18())
    small = '--limit 10 --epochs 1 --bs 5 --num_workers 0 --arch resnet18 --size 64 --out 32'.split() if 'check' not in line else []
    if 'compare' in line: small += ['--seeds', 0]
    name, *args = shlex.split(line)
    status, out, err = command(name, *args, *small)
    assert status == 0 and ('accuracy' in out or '20 images of 2 classes' in out), err

def ship(command, line, tmp_path):
    "Commands on a model: a small one"
    from resizer_fastai.data import ReadImage
    from resizer_fastai.learner import ResizerClassifier
    if 'demo' in line: pytest.skip('make test-demo')
    if 'onnx' in line: pytest.importorskip('onnxscript')
    ResizerClassifier('resnet18', 2, size=32, read=ReadImage(64), vocab=['cat', 'dog']).save_pretrained(tmp_path/'my_model')
    name, *args = shlex.split(line)
    status, _, err = command(name, *args)
    assert status == 0 and (tmp_path/args[-1]).exists(), err

# Numbers

if (repo/'results').exists():
    from test_results import DIFFERENCE, MEMORY, SHARE, row, runs, speed, tables

rows = [('sample', 'none'), ('sample', 'learned'), ('sample', 'muller'), ('woof-192-96', 'none'), ('woof-192-96-learned', 'learned'),
        ('woof-192-96-fresh', 'learned from zero'), ('woof-192-96-muon', 'learned'), ('pretrained', 'learned, rate x 0.01')]

def said(experiment, resizer):
    "What the table has to say in a row; columns without a meaning there are empty"
    accuracy, difference, seeds, share, time = row(experiment, resizer, 'bilinear', ['accuracy, %', DIFFERENCE, 'seeds', SHARE, 'time'])
    return [accuracy, difference, seeds, *dict(sample=[share if resizer != 'none' else '', time]).get(experiment, ['', ''])]

def mean(experiment, resizer): return f'{runs.query("experiment==@experiment and resizer==@resizer").accuracy.mean():.2f}'

def cost(what, model, scale=1): return speed.query('experiment=="speed" and what==@what and model==@model').value.item()/scale

def difference(*args): return said(*args)[1]

def claims():
    "Sentences of README, as the runs have them"
    points, low, high = re.findall(r'[+-][\d.]+', difference('woof-192-96-learned', 'learned'))
    cpu = {(o, k): f'{cost(o, k):.2f}' for o in ('training step', 'inference') for k in ('plain module', 'none')}
    return dict(
        drawn=f'{mean("sample", "bilinear")} % of the validation images right after bilinear interpolation, {mean("sample", "learned")} % after '
              f'the resizer, and {mean("sample", "none")} % on the large images themselves',
        photographs=f'the difference from bilinear was {points} percentage points with a 95 % interval of {low} to {high} over ten seeds',
        muon=f'With another classifier and optimizer it was {difference("woof-192-96-muon", "learned")}',
        to_win=f'there was {difference("woof-192-96", "none").split()[0].lstrip("+")} percentage points to win',
        time=f'a training step takes {cpu["training step", "plain module"]} times as long, and inference {cpu["inference", "plain module"]} '
             f'times. Without a resizer, at 448 pixels, a step takes {cpu["training step", "none"]} times as long',
        pretrained=f'In three seeds, nothing was gained, either: {difference("pretrained", "learned, rate x 0.01")}.'.replace(' (', ' percentage points (', 1),
        recipe=f'it reached {mean("woof-448-224-muon", "bilinear")} %, and the default recipe {mean("woof-448-224", "bilinear")} %')

def prose(): return re.sub(r'\s+', ' ', re.sub(r'```.*?```', '', readme, flags=re.DOTALL))

needs_results = pytest.mark.skipif(not (repo/'results').exists(), reason='only the installed library is here')

@needs_results
@pytest.mark.parametrize('name', ['drawn', 'photographs', 'muon', 'to_win', 'time', 'pretrained', 'recipe'])
def test_sentence_says_what_the_runs_say(name):
    print(claims()[name])
    assert claims()[name] in prose()

@needs_results
@pytest.mark.parametrize('i', range(len(rows)), ids=[' '.join(o) for o in rows])
def test_row_says_what_the_runs_say(i):
    experiment, resizer = rows[i]
    print(runs.query('experiment==@experiment and resizer in ["bilinear", @resizer]').to_string())
    table = next(lines for head, lines in tables(readme) if 'seeds' in head)
    assert len(table) == len(rows) and table[i][2:] == said(experiment, resizer)

@needs_results
def test_table_of_cost_says_what_was_measured():
    table = next(lines for head, lines in tables(readme) if 'training step' in head)
    for cells, model in zip(table, ('plain module', 'none'), strict=True):
        print(speed.query('experiment=="speed" and model==@model').to_string())
        assert cells[1:] == [f'{cost(o, model):.2f}' for o in ('training step', 'inference')] + [f'{cost(MEMORY, model, 1e6):.0f}']

@needs_results
def test_every_number_has_a_source():
    "But for those of others, which have theirs beside them, and for learning rates and versions"
    text = prose().split('## What others found')[0]
    for o in claims().values(): text = text.replace(o, '')
    for o in rows: text = text.replace(' | '.join(said(*o)[:3]), '')
    left = re.findall(r'(?<![\w.-])[+-]?\d+\.\d+(?![\w.])', re.sub(r'\]\([^)]*\)|Python 3.11|version 0.1', '', text))
    shares = [o for pair in rows[:3] for o in said(*pair)[3:] if o]
    costs = [f'{cost(o, model):.2f}' for o in ('training step', 'inference') for model in ('plain module', 'none')]
    assert not set(left)-{*shares, *costs}

def test_readme_is_short():
    text = re.sub(r'^(\||!\[).*$', '', re.sub(r'```.*?```', '', readme, flags=re.DOTALL), flags=re.MULTILINE)
    assert len(re.sub(r'\]\([^)]*\)', ']', text).split()) <= 900

def test_pictures_are_there():
    for o in re.findall(r'!\[.+?\]\((.+?)\)', readme): assert (repo/o).exists() or not (repo/'nbs').exists()
