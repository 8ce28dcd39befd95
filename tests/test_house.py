"The library is what the notebooks say, and the house is in order."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import repo

if not (repo/'nbs').exists(): pytest.skip('only the installed library is here', allow_module_level=True)

notebooks = sorted((repo/'nbs').rglob('*.ipynb'))
modules = ['data', 'resizer', 'learner', 'show', 'train', 'compare', 'ship', 'bench', 'check']

def python(code, **kwargs): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, **kwargs)

def source(name): return (repo/'resizer_fastai'/f'{name}.py').read_text()

def test_library_is_what_the_notebooks_say(tmp_path):
    pytest.importorskip('nbdev', reason='exporting needs nbdev')
    for name in ['settings.ini', 'setup.py', 'nbs', 'README.md']:
        copy = shutil.copytree if (repo/name).is_dir() else shutil.copy
        copy(repo/name, tmp_path/name)
    (tmp_path/'resizer_fastai').mkdir()
    for name in ('all.py', '__init__.py'): shutil.copy(repo/'resizer_fastai'/name, tmp_path/'resizer_fastai')
    res = subprocess.run([Path(sys.executable).parent/'nbdev_export'], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    written = {p.name: p.read_text() for p in (tmp_path/'resizer_fastai').glob('*.py')}
    here = {p.name: p.read_text() for p in (repo/'resizer_fastai').glob('*.py')}
    assert written == here, 'the library is not what the notebooks say: make export'
    assert (tmp_path/'pyproject.toml').read_text() == (repo/'pyproject.toml').read_text()

@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)
def test_notebook_is_small_and_clean(notebook):
    assert notebook.stat().st_size < 1_000_000
    cells = [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert not [o for c in cells for o in ''.join(c['source']).splitlines() if len(o) > 120]
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']

def test_no_name_of_fastai_is_shadowed():
    "Beside what a module takes from fastai itself, `resizer_fastai.all` brings only names that `fastai.vision.all` does not have"
    code = '''
import fastai.vision.all as fv, resizer_fastai.all as ra
public = lambda m: {k for k in vars(m) if not k.startswith('_')}
print(sorted(k for k in public(ra) & public(fv) if getattr(ra, k) is not getattr(fv, k)))
print(sorted({'get_path','get_dls','resizer_block','Resizer','FixedResizer','ResizerClassifier','resizer_learner','resizer_train',
              'resizer_compare','resizer_check','resizer_bench','resizers','bodies','load_run','check_images'} - public(ra)))'''
    assert python(code).stdout.split('\n')[:2] == ['[]', '[]']

@pytest.mark.parametrize('name', modules)
def test_imports_go_upwards_only(name):
    used = {n.module for n in ast.walk(ast.parse(source(name))) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
    assert used <= set(modules[:modules.index(name)])

@pytest.mark.parametrize('name', modules)
def test_no_private_name_of_pytorch(name):
    "No custom autograd function and no custom operator either"
    code = re.sub(r'"[^"\n]*"|#.*', '', source(name))
    found = re.findall(r'\b(?:torch|nn)(?:\.\w+)*\._(?!_)\w+|\bfrom torch[\w.]* import .*\b_\w+|torch\.ops\b|autograd\.Function|custom_op\b', code)
    assert not found

@pytest.mark.parametrize('name', modules)
def test_lines_have_at_most_120_characters(name):
    "But for the names that nbdev lists"
    code = re.sub(r'__all__ = \[.*?\]', '', source(name), flags=re.DOTALL)
    assert not [o for o in code.splitlines() if len(o) > 120]

def test_resizer_module_needs_torch_only():
    code = "import sys, resizer_fastai.resizer; print([m for m in ('fastai', 'matplotlib', 'pandas', 'nbdev') if m in sys.modules])"
    assert python(code).stdout.strip() == '[]'

@pytest.mark.slow
def test_library_needs_no_notebook():
    code = "import sys; from resizer_fastai.all import *; print([m for m in ('nbdev', 'execnb', 'ipykernel') if m in sys.modules])"
    assert python(code).stdout.strip() == '[]'

def test_tree_is_small():
    files = subprocess.run(['git', 'ls-files'], cwd=repo, capture_output=True, text=True).stdout.split()
    if not files: pytest.skip('not a git checkout')
    assert sum((repo/f).stat().st_size for f in files if (repo/f).exists()) < 8_000_000
