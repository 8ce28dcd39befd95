"README's blocks run, on fewer images and for one epoch."
import re, shlex
import pytest
from conftest import repo
from fastai.vision.all import plt

blocks = re.findall(r'```(\w*)\n(.*?)```', (repo/'README.md').read_text(), flags=re.DOTALL)
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
def test_command_runs(command, line):
    name, *args = shlex.split(line)
    status, out, err = command(name, *args, '--limit', 10, '--epochs', 1, '--bs', 5, '--num_workers', 0)
    assert status == 0 and 'accuracy' in out, err
