"Commands answer in one sentence, whatever they are given."
import random
from importlib.metadata import entry_points
import pytest
from resizer_fastai import data

commands = ['resizer_train', 'resizer_compare', 'resizer_check', 'resizer_predict', 'resizer_export', 'resizer_demo', 'resizer_bench']

def test_every_command_has_a_main_and_a_help(command):
    assert {o.name for o in entry_points(group='console_scripts') if o.value.startswith('resizer_fastai')} == set(commands)
    for o in commands:
        status, out, _ = command(o, '--help')
        assert status == 0 and '--debug' in out

@pytest.mark.parametrize('args,says', [
    (['resizer_train', '--data', 'sample', '--epochs', 0], 'epochs must be 1 or more: got 0'), (['resizer_train', '--opt', 'lamb'], 'opt must be one of adamw'),
    (['resizer_train', '--data', 'sample', '--size', '4x'], 'a size must be PIXELS or HEIGHTxWIDTH: got 4x'), (['resizer_train', '--bs', 'many'], 'invalid int value'),
    (['resizer_train', '--data', 'sample', '--resizer', 'lanczos', '--limit', 10], 'register yours first'), (['resizer_train', '--colour'], 'unrecognized arguments'),
    (['resizer_compare', '--data', 'sample', '--resizers', 'bilinear,lanczos'], "no resizer 'lanczos'"), (['resizer_compare', '--seeds', 'a'], 'invalid literal'),
    (['resizer_train', '--data', 'sample', '--arch', 'os.system', '--limit', 10], "no body 'os.system'")], ids=lambda o: ' '.join(map(str, o)) if isinstance(o, list) else '')
def test_usage_exits_2_with_one_sentence(command, tmp_path, args, says):
    status, _, err = command(*args)
    assert status == 2 and says in err and 'Traceback' not in err
    assert not [p for p in tmp_path.rglob('*') if p.is_dir() and p.name != 'runs']

def test_traceback_only_with_debug(command):
    assert command('resizer_train', '--data', 'nowhere')[0] == 1
    with pytest.raises(FileNotFoundError): command('resizer_train', '--data', 'nowhere', '--debug')

def test_no_network_and_no_data(command, monkeypatch, tmp_path):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    monkeypatch.setattr(data, 'untar_data', lambda url: (_ for _ in ()).throw(OSError('Name or service not known')))
    status, _, err = command('resizer_train', '--data', 'imagenette-160')
    assert status == 1 and 'cannot be downloaded' in err and '--data DIR for your own folder' in err

def random_line(rng):
    values = ['0', '-1', '1', '3.5', 'nan', '1e400', '', ' ', 'x', '64x', '0x0', 'sample', 'nowhere', '../..', 'none', '--', '$(id)', 'ä\udcff', '9'*30]
    names = ['data', 'limit', 'valid_pct', 'valid-pct', 'noisy', 'arch', 'resizer', 'size', 'out', 'resize', 'min_scale', 'no-flip', 'epochs', 'recipe', 'opt',
             'lr', 'bs', 'seed', 'pretrained', 'init_from', 'precision', 'cache', 'num_workers', 'name', 'module', 'resume', 'resizers', 'seeds', 'base', 'csv']
    args = [rng.choice(commands[:5])]
    for _ in range(rng.randrange(5)): args += [f'--{rng.choice(names)}'] + rng.choices(values, k=rng.randrange(2))
    return args

def test_100_random_command_lines_end_in_one_sentence(command, monkeypatch):
    "No data are there, so that nothing trains; some lines are right but for that"
    def nothing(*args): raise FileNotFoundError('no data here')
    for name in ('resizer_fastai.train.get_path', 'resizer_fastai.check.get_path', 'resizer_fastai.data.get_path'): monkeypatch.setattr(name, nothing)
    rng = random.Random(0)
    statuses = []
    for _ in range(100):
        args = random_line(rng)
        status, _, err = command(*args)
        statuses.append(status)
        assert status in (0, 1, 2) and 'Traceback' not in err, args
        assert status == 0 or len(err.strip().splitlines()[-1]) > 10, args
    assert statuses.count(1) > 5 and statuses.count(2) > 20
