"The lists of settings in results/: every line is a command that `resizer_train` takes."
import os, shlex, shutil, subprocess
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from resizer_fastai.data import parse_size
from resizer_fastai.train import check_options, resizer_train

results = Path(__file__).parent.parent/'results'
pytestmark = pytest.mark.skipif(not shutil.which('bash'), reason='no bash')

@pytest.fixture
def commands(tmp_path):
    "What a list would run, for a seed and settings"
    for name in ('resizer_train', 'resizer_compare'):
        stand_in = tmp_path/name
        stand_in.write_text('#!/usr/bin/env bash\nprintf "%q " "$@"; echo\n')
        stand_in.chmod(0o755)
    def run(name, *args, runs='runs'):
        return subprocess.run(['bash', results/name, *args], capture_output=True, text=True, env=os.environ | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', RUNS=runs))
    return run

@pytest.mark.parametrize('name,n', [('tuning.sh', 15), ('recipe.sh', 46)])
def test_every_setting_is_a_run_of_its_own(commands, name, n):
    res = commands(name, '3')
    lines = [vars(anno_parser(resizer_train).parse_args(shlex.split(o))) for o in res.stdout.splitlines()]
    assert res.returncode == 0 and len(lines) == n
    for o in lines: check_options(o | dict(size=parse_size(o['size']), out=parse_size(o['out'])))
    assert all(o['tune'] and o['resume'] and o['seed'] == 3 and o['runs'] == 'runs' for o in lines)
    assert len({o['name'] for o in lines}) == len({tuple((k, v) for k, v in o.items() if k != 'name') for o in lines}) == n

def test_settings_by_name(commands):
    res = commands('recipe.sh', '0', 'clip-1', 'recipe', 'zero+fan_in')
    assert [o.split()[o.split().index('--name')+1] for o in res.stdout.splitlines()] == ['clip-1-0', 'recipe-0', 'zero+fan_in-0']
    res = commands('tuning.sh', '0', 'learned', 'learnt')
    assert res.returncode == 2 and not res.stdout and res.stderr.startswith('no setting learnt: there are bilinear learned ') and len(res.stderr.splitlines()) == 1

def test_a_folder_with_a_space(commands):
    res = commands('tuning.sh', '0', 'start', runs='my runs')
    args = shlex.split(res.stdout)
    assert args[args.index('--start')+1] == 'my runs/bilinear-{seed}' and args[args.index('--runs')+1] == 'my runs'

def test_the_matrix_is_printed_cell_by_cell(commands, tmp_path):
    "A cell that two of its comparisons share is printed once, and made once by the one that comes first"
    assert len(commands('imagewoof.sh', '--limit', '100').stdout.splitlines()) == 16
    (tmp_path/'resizer_compare').write_text('#!/usr/bin/env bash\necho one cell\necho "another of $3"\n')
    assert commands('imagewoof.sh', '--dry_run').stdout == 'one cell\nanother of --arch\n'
    (tmp_path/'resizer_compare').write_text('#!/usr/bin/env bash\nexit 2\n')
    assert [commands('imagewoof.sh', *o).returncode for o in ([], ['--dry_run'])] == [2, 2]
