"results/ says what its runs say, and stays small."
import os, re, shlex, subprocess, sys
from functools import cache
from itertools import permutations
import pandas as pd, pytest
from conftest import repo

folder = repo/'results'
if not folder.exists(): pytest.skip('only the installed library is here', allow_module_level=True)

from resizer_fastai.compare import by_seed, interval, resizer_compare, share_of_detail

columns = 'experiment,resizer,seed,accuracy,epochs,seconds,device,precision,versions,date,command,commit'.split(',')
speed_columns = 'experiment,what,model,value,unit,device,precision,versions,date,command,commit'.split(',')
SHARE = 'share of the headroom (95 % range)'
DIFFERENCE = 'difference, percentage points (95 % interval)'
MEMORY = 'activations saved for backward, batch 8'
read = lambda name: (folder/name).read_text() if (folder/name).exists() else ''
readme, rules, script = map(read, ('README.md', 'preregistration.md', 'experiments.sh'))
runs, speed = (pd.read_csv(folder/o) for o in ('runs.csv', 'speed.csv'))

def of(experiment):
    "Its runs, to be paired by seed: `again` is bilinear with the seed 1000 higher"
    df = runs[runs.experiment==experiment]
    return df.assign(seed=df.seed-1000*(df.resizer=='again'))

def mean_sd(a): return f'{a.mean():.2f}' + (f' ± {a.std():.2f}' if len(a)>1 else '')

def share_of_headroom(df, resizer):
    "As the library's `share_of_detail`, of `none` minus `bilinear`, since version 1 had no `blurred`"
    as_blurred = df[df.resizer=='bilinear'].assign(resizer='blurred')
    return '{:.0%} ({:.0%} to {:.0%})'.format(*share_of_detail(pd.concat([df, as_blurred]), resizer))

def row(experiment, resizer, base, header):
    "What a row of a table has to say; `base` is what it is compared with, or empty"
    df = of(experiment)
    mine = df[df.resizer==resizer]
    cells = dict(experiment=f'`{experiment}`', resizer=resizer, seeds=str(len(mine)))
    cells |= {'accuracy, %': mean_sd(mine.accuracy), 'compared with': '', DIFFERENCE: ''}
    if base:
        d = by_seed(df, resizer, base)
        other = df[(df.resizer==base) & df.seed.isin(d.index)]
        ranged = ' ({:+.2f} to {:+.2f})'.format(*interval(d)) if len(d)>2 else ''
        cells['compared with'] = f'{base} {mean_sd(other.accuracy)}'
        cells[DIFFERENCE] = f'{d.mean():+.2f}{ranged}'
    if SHARE in header and 'none' in set(df.resizer): cells[SHARE] = share_of_headroom(df, resizer)
    if 'time' in header: cells['time'] = f'{mine.seconds.mean()/df[df.resizer=="bilinear"].seconds.mean():.2f}'
    return [cells.get(k, '') for k in header]

def speed_table():
    df = speed.query('experiment=="speed"').pivot(index='model', columns='what', values='value')
    rows = [['model', 'training step', 'inference', 'activations saved, MB'], ['---']*4]
    for k in ('plain module', 'version 1', 'none'):
        o = df.loc[k]
        rows.append([k, f'{o["training step"]:.2f}', f'{o["inference"]:.2f}', f'{o[MEMORY]/1e6:.0f}'])
    return '\n'.join(f'| {" | ".join(o)} |' for o in rows)

def tables(text):
    "Each table of a page: its header, and its rows as lists of cells"
    cells = lambda line: [o.strip() for o in line.strip('|\n').split('|')]
    for block in re.findall(r'(?:^\|.*\n?)+', text, flags=re.M):
        header, _, *lines = block.splitlines()
        yield cells(header), [cells(o) for o in lines]

printed = [(h, o) for h, lines in tables(readme) if h[0]=='experiment' for o in lines]

def id_of(o): return '-'.join(o[1][:2]).strip('`').replace('`', '')

@pytest.mark.parametrize('header,cells', printed, ids=[id_of(o) for o in printed])
def test_row_is_what_the_runs_say(header, cells):
    experiment, resizer = cells[0].strip('`'), cells[1]
    compared = dict(zip(header, cells))['compared with']
    want = row(experiment, resizer, re.sub(r' [\d.]+( ± [\d.]+)?$', '', compared), header)
    if SHARE in header and 'learned' not in resizer and not cells[header.index(SHARE)]: want[header.index(SHARE)] = ''
    assert cells == want

def test_every_experiment_has_a_row():
    assert set(runs.experiment) == {o[0].strip('`') for _, o in printed}

def test_table_of_cost_is_what_speed_csv_says():
    assert speed_table() in readme
    loading = speed[speed.what=='loading, later epochs'].set_index('model').value
    assert f'`aug_transforms` {loading["fastai, aug_transforms"]:.0f} images/s' in readme
    for k in ('--cache none', '--cache disk'): assert re.search(rf'\b{loading[k]:.0f} with `{k}`', readme)

@cache
def figures():
    "Accuracies, their means, and differences of any two resizers, as they are printed; and those with their intervals"
    said,ranged = {f'{o:.2f}' for o in runs.accuracy},set()
    one_run = runs[runs.experiment.str.startswith('woof-448')].assign(resizer=lambda df: df.experiment+df.resizer)
    for df in [*map(of, runs.experiment.unique()), one_run]:
        wide = df.pivot(index='seed', columns='resizer', values='accuracy')
        said |= {f'{o:.2f}' for o in wide.mean()}
        for d in ((wide[a]-wide[b]).dropna() for a, b in permutations(wide, 2)):
            said.add(f'{d.mean():+.2f}')
            if len(d)>2: ranged.add(tuple(f'{o:+.2f}' for o in (d.mean(), *interval(d))))
    return said | {o.lstrip('+') for o in said}, ranged

@pytest.mark.parametrize('text', [readme, rules], ids=['README', 'preregistration'])
def test_figures_in_prose_are_those_of_the_runs(text):
    prose = '\n'.join(o for o in text.splitlines() if not o.startswith('|'))
    said,ranged = figures()
    number,either = r'([+-]\d+\.\d\d)',r'([+-]?\d+\.\d\d)'
    between = r'(?: (?:percentage )?points)?(?: (?:over|above) \S+| above)? \((?:95 % interval )?'   # `+0.70 points over bilinear (`
    with_interval = rf'{either}{between}{number} to {number}'
    found = re.findall(with_interval, prose)
    assert len(found)>2 and not {(o if o[0] in '+-' else '+'+o, *e) for o, *e in found}-ranged
    single = re.findall(r'(?<![\w.])[+-]?\d+\.\d\d(?![\d.])', re.sub(with_interval, '', prose))
    assert single and not set(single)-said

def test_first_lines_are_what_the_tables_say():
    first = '\n'.join(readme.splitlines()[2:5])
    share = share_of_headroom(of('sample'), 'learned').replace('%', '')
    share = re.match(r'(\d+) \((\d+) to (\d+)\)', share).groups()
    worth = by_seed(of('sample'), 'none', 'bilinear').mean()
    assert f'{share[0]} % of {worth:.0f} points of headroom (range {share[1]} to {share[2]} %' in first

def test_behind_in_all_ten_pairs():
    assert (by_seed(of('woof-192-96-muon'), 'learned', 'bilinear')<0).sum()==10

def test_columns_and_no_row_twice():
    assert list(runs)==columns and list(speed)==speed_columns
    assert not runs.duplicated(['experiment','resizer','seed']).any()
    assert not speed.duplicated(['experiment','what','model']).any()
    assert runs.drop(columns='seconds').notna().all(axis=None) and runs.accuracy.between(0, 100).all()
    assert runs.date.str.fullmatch(r'\d{4}-\d\d-\d\d').all() and runs.commit.str.fullmatch('[0-9a-f]{7}').all()

def test_command_is_that_of_its_row():
    "Seed, epochs and precision; those that a shell ran"
    shell = runs[runs.command.str.startswith('resizer_train')]
    assert len(shell)==234
    for o in shell.itertuples(): assert f'--seed {o.seed} ' in o.command and f'--epochs {o.epochs} ' in o.command, o

def test_folder_is_small():
    files = {p.name: p for p in folder.iterdir() if p.is_file()}
    assert set(files) == {'runs.csv', 'speed.csv', 'README.md', 'preregistration.md', 'experiments.sh', 'bodies.py', 'reliability.md'}
    assert sum(p.stat().st_size for p in files.values())<300_000
    assert len(readme.splitlines())<=120 and len(rules.splitlines())<=80

@pytest.mark.parametrize('text', [readme, rules], ids=['README', 'preregistration'])
def test_experiments_named_exist(text):
    known = set(runs.experiment)
    kinds = r'(woof|transfer|sample|recipe|tuning|pretrained)\b'
    named = {o for o in re.findall(r'`([^`\s]+)`', text) if re.match(kinds, o)}
    assert len(named)>3 and not named-known-{'transfer-*'}

def listed(): return subprocess.run(['bash', folder/'experiments.sh'], capture_output=True, text=True).stdout.split()

def test_experiments_listed_are_those_of_the_runs():
    names = listed()
    assert len(names)>8 and not set(names)-set(runs.experiment)
    res = subprocess.run(['bash', folder/'experiments.sh', 'nonsense'], capture_output=True, text=True)
    assert res.returncode==2 and all(o in res.stderr for o in names)

@pytest.mark.parametrize('name', listed())
def test_experiment_passes_a_dry_run(name, tmp_path, monkeypatch, capsys):
    "With a command that prints its arguments in place of `resizer_compare`, which then gets them in this process"
    from resizer_fastai.resizer import resizers
    stub = tmp_path/'bin'/'resizer_compare'
    stub.parent.mkdir()
    stub.write_text('#!/bin/bash\nprintf "%q " "$@"; echo\n')
    stub.chmod(0o755)
    env = os.environ | dict(PATH=f'{stub.parent}:{os.environ["PATH"]}', RUNS=str(tmp_path/'runs'))
    res = subprocess.run(['bash', folder/'experiments.sh', name, '--dry_run'], capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr
    monkeypatch.syspath_prepend(tmp_path/'runs')
    before = set(resizers)
    try:
        for line in res.stdout.splitlines():
            resizer_compare.main(shlex.split(line))
            commands = capsys.readouterr().out.splitlines()
            assert commands and all(o.startswith('resizer_train ') for o in commands)
    finally:
        sys.modules.pop('resizer_variants', None)
        for k in set(resizers)-before: del resizers[k]
    assert '--dry_run' in res.stdout
