"The library and README are what the notebooks say, and the house is in order."
import ast, json, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import repo

notebooks = sorted((repo/'nbs').rglob('*.ipynb'))

def python(code, **kwargs): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, **kwargs)

def test_library_is_what_the_notebooks_say(tmp_path):
    pytest.importorskip('nbdev', reason='exporting needs nbdev')
    for name in ['settings.ini', 'setup.py', 'nbs', 'README.md']:
        copy = shutil.copytree if (repo/name).is_dir() else shutil.copy
        copy(repo/name, tmp_path/name)
    (tmp_path/'resizer_fastai').mkdir()
    shutil.copy(repo/'resizer_fastai'/'all.py', tmp_path/'resizer_fastai')
    res = subprocess.run([Path(sys.executable).parent/'nbdev_export'], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    written = {p.name: p.read_text() for p in (tmp_path/'resizer_fastai').glob('*.py')}
    here = {p.name: p.read_text() for p in (repo/'resizer_fastai').glob('*.py')}
    assert written == here, 'the library is not what the notebooks say: make export'
    assert (tmp_path/'pyproject.toml').read_text() == (repo/'pyproject.toml').read_text()

def test_readme_is_what_index_says():
    res = subprocess.run([sys.executable, repo/'nbs'/'readme.py', '--check'], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr

@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)
def test_notebook_is_small_and_clean(notebook):
    assert notebook.stat().st_size < 1_000_000
    outputs = [o for c in json.loads(notebook.read_text())['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']

def test_no_name_of_fastai_is_shadowed():
    "Beside what a module takes from fastai itself, `resizer_fastai.all` brings only names that `fastai.vision.all` does not have"
    code = '''
import fastai.vision.all as fv, resizer_fastai.all as ra
public = lambda m: {k for k in vars(m) if not k.startswith('_')}
print(sorted(k for k in public(ra) & public(fv) if getattr(ra, k) is not getattr(fv, k)))
missing = {'get_path','get_dls','resizer_block','Resizer','FixedResizer','ResizerClassifier','resizer_learner','resizer_train','resizer_compare','resizer_check','resizer_bench','read_image','cache_images'} - public(ra)
print(sorted(missing))'''
    assert python(code).stdout.split('\n')[:2] == ['[]', '[]']

def test_imports_go_upwards_only():
    order = ['data', 'resizer', 'learner', 'show', 'train', 'compare', 'bench']
    for i, name in enumerate(order):
        tree = ast.parse((repo/'resizer_fastai'/f'{name}.py').read_text())
        used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        assert used <= set(order[:i]), name

def test_resizer_brings_in_torch_only():
    code = "import sys, resizer_fastai.resizer; print([m for m in ('fastai','matplotlib','pandas','nbdev') if m in sys.modules])"
    assert python(code).stdout.strip() == '[]'

def test_library_needs_no_notebook():
    code = "import sys; from resizer_fastai.all import *; print([m for m in ('nbdev','execnb','ipykernel') if m in sys.modules])"
    assert python(code).stdout.strip() == '[]'

def test_tree_is_small():
    files = subprocess.run(['git', 'ls-files'], cwd=repo, capture_output=True, text=True).stdout.split()
    if not files: pytest.skip('not a git checkout')
    assert sum((repo/f).stat().st_size for f in files if (repo/f).exists()) < 8_000_000
