"What lies in `results/` agrees with itself, and README with it."
import json, re, shlex, shutil
import pandas as pd, pytest
from conftest import repo
from resizer_fastai.compare import paired_interval, resizer_compare

results = repo/'results'
cells = sorted((results/'cells').glob('*'))

def rows_of(text):
    "The rows of the first table in markdown, by the names of its columns"
    lines = [[c.strip() for c in o.split('|')[1:-1]] for o in text.split('\n\n')[0].split('\n')]
    return [dict(zip(lines[0], o)) for o in lines[2:]]

def numbers(s): return [float(o) for o in re.findall(r'[-+]?\d+\.\d+', s)]

@pytest.mark.parametrize('name', [p.name for p in cells])
def test_a_table_is_what_its_runs_say(tmp_path, name):
    "Those whose runs lie there, too, without pages and the weights of the body; a run is small enough to be sent about"
    shutil.copytree(results/'cells'/name, tmp_path/name)
    resizer_compare(runs=tmp_path, name=name, collect=True)
    for made, kept in ('table.md', f'{name}.md'), ('runs.csv', f'{name}.csv'): assert (tmp_path/name/made).read_text() == (results/kept).read_text()
    for cell in (results/'cells'/name).iterdir(): assert sum(p.stat().st_size for p in cell.iterdir()) < 1_000_000

tables = {p: next(c for c in (p.with_suffix('.csv'), p.with_name(re.sub('-(antialias|pil)$', '', p.stem)+'.csv')) if c.exists()) for p in sorted([*results.glob('imagewoof-*.md'), results/'sample.md'])}

@pytest.mark.parametrize('table', tables, ids=lambda p: p.stem)
def test_a_table_is_what_its_rows_say(table):
    "Mean and standard deviation, differences in pairs, and seconds, from the file with a row a run, which has two digits more"
    runs, rows = pd.read_csv(tables[table]), rows_of(table.read_text())
    of = {arm: g.set_index(g.seed % 1000 if arm == 'again' else g.seed) for arm, g in runs.groupby('arm')}
    base, = [r['arm'] for r in rows if not r['difference, points (95 % interval)']]
    assert {r['arm'] for r in rows} == set(of)
    for r in rows:
        acc = of[r['arm']].accuracy
        assert int(r['seeds']) == len(acc)
        assert numbers(r['accuracy, %']) == pytest.approx([acc.mean(), *[acc.std()]*(len(acc) > 1)], abs=0.00501)
        assert float(r['training, s']) == pytest.approx(of[r['arm']].seconds.mean(), abs=0.501)
        if r['arm'] == base: continue
        both = of[base].index.intersection(acc.index)
        said, known = numbers(r['difference, points (95 % interval)']), paired_interval(acc[both], of[base].accuracy[both])
        n = 3 if len(both) > 1 else 1   # the interval of one pair is over images
        assert said[:n] == pytest.approx(known[:n], abs=0.00501)

def test_protocols_are_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = re.findall('^    (resizer_compare .+)$', (results/'README.md').read_text(), re.M)
    for line in lines: resizer_compare.main([*shlex.split(line)[1:], '--dry_run'])
    assert len(lines) == 4 and capsys.readouterr().out.count('resizer_train ') == 18

def test_figures_of_the_readme_are_those_of_the_results(monkeypatch):
    "What hidden code of index.ipynb quotes, made anew, is what stands there"
    shell = pytest.importorskip('execnb.shell', reason='notebooks are run where nbdev is installed').CaptureShell(path=repo/'nbs')
    monkeypatch.chdir(repo/'nbs')
    shell.run('from fastai.vision.all import *; from resizer_fastai.all import *')
    quoting = [c for c in json.loads((repo/'nbs'/'index.ipynb').read_text())['cells'] if ''.join(c['source']).startswith('#| hide')]
    text = lambda outputs: [''.join(o['data']['text/markdown']) for o in outputs]
    quoted = [(text(shell.run(''.join(c['source']))), text(c['outputs'])) for c in quoting]
    assert all(made == kept for made, kept in quoted) and sum(len(made) for made, _ in quoted) >= 7
