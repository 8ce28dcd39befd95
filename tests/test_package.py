"The packages hold what they need, and what is installed works."
import json, re, shutil, subprocess, sys, tarfile, zipfile
from importlib.util import find_spec
from pathlib import Path
import pytest
from conftest import repo
import resizer_fastai

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    "A wheel that is built from the source distribution, and that"
    if not (repo/'setup.py').exists(): pytest.skip('only the installed library is here')
    pytest.importorskip('build')
    tree, out = (tmp_path_factory.mktemp(o) for o in ('tree', 'dist'))
    shutil.copytree(repo, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns('.*', 'build', 'runs', '*.egg-info', '__pycache__'))
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', out, tree], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-2000:]+res.stderr
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))

def test_packages_hold_everything(packages):
    wheel, sdist = zipfile.ZipFile(packages[0]).namelist(), tarfile.open(packages[1]).getnames()
    code = {o.relative_to(repo).as_posix() for o in (repo/'resizer_fastai').rglob('*') if o.is_file() and '__pycache__' not in o.parts}
    assert code <= set(wheel) and code <= {o.split('/', 1)[1] for o in sdist if '/' in o}
    assert any(o.endswith('/settings.ini') for o in sdist)
    assert {o.split('/')[0] for o in wheel} == {'resizer_fastai', f'resizer_fastai-{resizer_fastai.__version__}.dist-info'}

def test_description_has_absolute_addresses_only(packages):
    text = zipfile.ZipFile(packages[0]).read(f'resizer_fastai-{resizer_fastai.__version__}.dist-info/METADATA').decode()
    links = re.findall(r'\]\(([^)]*)\)', text)
    assert len(links) > 10 and all(o.startswith('https://') for o in links)
    assert [o for o in links if o.endswith('.jpg')] == [o for o in links if o.startswith('https://raw.githubusercontent.com/')] != []
    res = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *packages], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout

def test_version_is_in_one_place(packages):
    assert f'version = {resizer_fastai.__version__}\n' in (repo/'settings.ini').read_text()
    assert resizer_fastai.__version__ in packages[0].name and resizer_fastai.__version__ in packages[1].name

def test_train_predict_export(command, tmp_path):
    options = '--data sample --limit 40 --arch squeezenet1_1 --size 64 --out 32 --bs 10 --epochs 1 --num_workers 0 --name a'.split()
    for line in [['resizer_train', *options], ['resizer_predict', 'runs/a', 'runs/a/images', '--json', 'a.json', '--topk', 2],
                 ['resizer_export', 'runs/a', '--pt2', 'a.pt2'], *[['resizer_export', 'runs/a', '--onnx', 'a.onnx']]*bool(find_spec('onnxscript'))]:
        status, out, err = command(*line)
        assert status == 0, err
    rows = json.loads(Path('a.json').read_text())
    assert len(rows) == len(list(Path('runs/a/images').iterdir())) and all(o['probability_1'] >= o['probability_2'] for o in rows)
