"A comparison pairs runs by seed, and refuses what would be none."
import json, shlex
import numpy as np, pandas as pd, pytest
from resizer_fastai.compare import (by_seed, collect_runs, conclusions, resizer_compare, results_table, share_of_detail, write_comparison)
from resizer_fastai.data import command_parser
from resizer_fastai.train import resizer_train, run_name, train_options

small = dict(data='sample', arch='squeezenet1_1', size=64, out=32, limit=20, bs=10, epochs=1, num_workers=0, precision='fp32')
made_up = dict(bilinear=60, blurred=66, none=70, learned=62)

def runs(accuracy=made_up, seeds=(0, 1, 2, 3), noise=0.3):
    rng = np.random.RandomState(0)
    return pd.DataFrame([dict(resizer=r, seed=s, accuracy=a+noise*rng.randn(), epoch_seconds=10.) for r, a in accuracy.items() for s in seeds])

@pytest.fixture
def write(tmp_path):
    "Write a finished run into the folder of a comparison, without training it"
    def write(resizer, seed, accuracy=0.5, images=('a', 'b'), precision='fp32', finished=True, pixels='', **kwargs):
        o = dict(train_options(**small | kwargs, resizer=resizer, seed=seed))
        path = tmp_path/run_name(o)
        path.mkdir()
        data = dict(train=20, valid=20, left_out=0, classes=['x', 'y'], short_side=128, enlarged=0., pixels=pixels)
        run = dict(args=o, metrics=dict(accuracy=accuracy, valid_loss=1., seconds=3.) if finished else None, parameters={}, precision=precision, device='a machine',
                   versions=dict(torch='2'), data=data, command=f'resizer_train --resizer {resizer} --seed {seed}')
        (path/'run.json').write_text(json.dumps(run))
        pd.DataFrame(dict(accuracy=[0.9, accuracy], seconds=[2., 1.])).to_csv(path/'metrics.csv', index=False)
        np.savez(path/'preds.npz', names=list(images))
    return write

def test_by_seed_pairs_equal_seeds_and_keeps_the_sign(write, tmp_path):
    "Whatever the order of the folders; seed 0 has one of the two only"
    for seed, a in ((3, 0.4), (1, 0.5), (2, 0.6), (0, 0.1)): write('bilinear', seed, a)
    for seed, a in ((2, 0.63), (3, 0.41), (1, 0.52)): write('learned', seed, a)
    table = collect_runs(tmp_path)
    assert by_seed(table, 'learned', 'bilinear').round(4).to_dict() == {1: 2, 2: 3, 3: 1}
    assert by_seed(table, 'bilinear', 'learned').mean() == pytest.approx(-2)

def test_write_comparison_takes_the_last_epoch_of_finished_runs(write, tmp_path):
    for seed in range(3): write('bilinear', seed, 0.5+0.01*seed), write('learned', seed, 0.6+0.012*seed)
    write('none', 0, finished=False)
    table = write_comparison(tmp_path)
    assert table.index.tolist() == ['bilinear', 'learned'] and table.accuracy.round(2).tolist() == [51, 61.2]
    assert table.difference['learned'] == pytest.approx(10.2) and table.low['learned'] < 10.2 < table.high['learned']
    text = (tmp_path/'table.md').read_text()
    assert 'learned is 10.20 percentage points above bilinear' in text and 'Only 20 validation images' in text
    assert '61.20' in (tmp_path/'report.html').read_text()

@pytest.mark.parametrize('other,says', [
    (dict(epochs=2), 'epochs 1, now 2'), (dict(lr=0.1), 'lr 0.003, now 0.1'), (dict(precision='bf16'), 'another precision'),
    (dict(images=('a', 'c')), 'validated on different images'), (dict(pixels='changed'), 'validated on different images')], ids=lambda o: str(o))
def test_collect_runs_refuses_what_is_no_comparison(write, tmp_path, other, says):
    write('bilinear', 0)
    write('learned', 0, **other)
    with pytest.raises(ValueError, match=says): collect_runs(tmp_path)

def test_collect_runs_passes_over_what_changes_no_result(write, tmp_path):
    write('bilinear', 0)
    write('learned', 0, cache='disk')
    assert len(collect_runs(tmp_path)) == 2
    with pytest.raises(ValueError, match='no finished run of antialias'): write_comparison(tmp_path, 'antialias')

def test_table_of_one_resizer_has_its_accuracy_only(write, tmp_path):
    write('bilinear', 0), write('bilinear', 1)
    assert write_comparison(tmp_path).difference.isna().all() and '| bilinear | 50.00 ± 0.00 | 2 |  |' in (tmp_path/'table.md').read_text()

def test_verdicts_need_three_seeds():
    assert all('too few for a verdict' in o for o in conclusions(runs(dict(bilinear=60, learned=70), seeds=(0, 1))))
    assert 'Seed-to-seed variation does not explain this.' in conclusions(runs(dict(bilinear=60, learned=70)))[0]
    assert 'Seed-to-seed variation alone could explain it.' in conclusions(runs(dict(bilinear=60, learned=60.1), noise=2))[0]

def test_a_sentence_for_everybody_on_what_there_is_to_win():
    table = runs(dict(bilinear=60, learned=70, none=80), seeds=(0,), noise=0)
    assert 'In these runs, the classifier gained 20.00 percentage points from seeing the large images (none); of these, learned won 10.00.' in conclusions(table)
    assert any('gained nothing' in o for o in conclusions(runs(dict(bilinear=60, learned=70, none=59), noise=0)))

def test_share_of_detail_holds_the_true_share_in_19_of_20_experiments():
    "Fieller's interval: 300 made-up comparisons in which a resizer recovers a quarter of the detail"
    inside = 0
    for i in range(300):
        rng = np.random.RandomState(i)
        table = pd.DataFrame([dict(resizer=r, seed=s, accuracy=a+0.4*rng.randn())
                              for r, a in dict(made_up, learned=61).items() for s in range(5)])
        _, low, high = share_of_detail(table, 'learned')
        inside += low <= 0.25 <= high
    assert 0.92 < inside/300 < 0.98

def test_cost_is_the_time_of_an_epoch_in_those_of_the_base():
    table = runs(dict(bilinear=60, none=70))
    table.loc[table.resizer == 'none', 'epoch_seconds'] = 35.
    assert results_table(table).cost.to_dict() == dict(bilinear=1, none=3.5)

def test_base_is_trained_too_and_names_may_be_lists_or_have_spaces(capsys, tmp_path):
    for names, seeds in (('none,learned', '0, 1'), (['none', 'learned'], [0, 1]), ('none, learned,bilinear', '0,1')):
        resizer_compare(names, seeds=seeds, dry_run=True, runs=tmp_path, **small)
        lines = [vars(command_parser(resizer_train).parse_args(shlex.split(o)[1:])) for o in capsys.readouterr().out.splitlines()]
        assert [(o['resizer'], o['seed']) for o in lines] == [(r, s) for s in (0, 1) for r in ('bilinear', 'none', 'learned')]

def test_dry_run_prints_commands_that_parse(capsys, tmp_path):
    resizer_compare('bilinear,none', seeds='3,4', dry_run=True, runs=tmp_path/'a b', flip=False, **small)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path/'a b').exists()
    parsed = [command_parser(resizer_train).parse_args(shlex.split(o)[1:]) for o in lines]
    assert {(o.resizer, o.seed) for o in parsed} == {(r, s) for r in ('bilinear', 'none') for s in (3, 4)}
    assert all(not o.flip and o.resume and o.runs == str(tmp_path/'a b'/'sample-squeezenet1_1-compare') for o in parsed)
