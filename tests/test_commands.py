"The commands as a shell sees them: what they write, what they say, and how they exit."
import json, shlex
import numpy as np, pytest
from conftest import make_images

small = ['--arch', 'resnet18', '--size', 64, '--out', 32, '--epochs', 1, '--bs', 10, '--workers', 0]

def check_one_sentence(res, code, *says):
    "The command exits with `code`, says one thing on stderr, and shows no traceback"
    assert res.returncode == code, res.stderr
    assert len(res.stderr.strip().split('\n')) == 1 and 'Traceback' not in res.stderr, res.stderr
    for o in says: assert o in res.stderr

def test_train_writes_a_run_and_exits_0(shell, tmp_path):
    res = shell('resizer_train', '--data', 'sample', '--limit', 20, *small)
    assert res.returncode == 0, res.stderr
    run = tmp_path/'runs'/'sample-resnet18-learned-42'
    assert {p.name for p in run.iterdir()} == {'run.json', 'metrics.csv', 'preds.npz', 'model', 'resizer.safetensors', 'resizer.json', 'images', 'report.html'}
    assert {p.name for p in (run/'model').iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    assert 'accuracy' in res.stdout and '\r' not in res.stdout
    check_one_sentence(shell('resizer_train', '--data', 'sample', '--limit', 20, *small), 2, 'exists', '--name')

def test_command_in_run_json_makes_the_same_run_again(shell, tmp_path):
    shell('resizer_train', '--data', 'sample', '--limit', 20, *small, '--seed', 0)
    first = tmp_path/'runs'/'sample-resnet18-learned-0'
    command = json.loads((first/'run.json').read_text())['command'].split()
    assert shell(*command, '--runs', 'again').returncode == 0
    a, b = [np.load(p/'preds.npz')['probs'] for p in (first, tmp_path/'again'/first.name)]
    np.testing.assert_allclose(a, b, atol=1e-4)

@pytest.mark.parametrize('args,says', [
    (['--arch', 'resnet5'], 'no body'), (['--arch', 'os.system'], 'no body'), (['--resizer', 'lanczos'], 'there are learned'),
    (['--out', 0], '1 or more'), (['--epochs', 0], '1 or more'), (['--bs', 0], '1 or more'), (['--precision', 'fp8'], 'precision is'),
    (['--workers', -1], '0 or more'), (['--arch', 'maxvit_t'], 'cannot be cut'), (['--arch', 'timm/resnet5'], 'no body'),
    (['--arch', 'vit_b_32', '--out', 32], 'vit_b_32 cannot take images of 3x32x32')])
def test_usage_exits_2(shell, tmp_path, args, says):
    check_one_sentence(shell('resizer_train', '--data', 'sample', '--limit', 20, *args), 2, says)
    assert not (tmp_path/'runs').exists()

def test_a_loss_that_is_not_finite_stops_the_run(shell, tmp_path):
    "At that batch, with its number and files; what was written before stays"
    from resizer_fastai.data import get_path
    res = shell('resizer_train', '--data', 'sample', '--limit', 20, *small, '--lr', 1e12)
    check_one_sentence(res, 1, 'the loss is nan in batch 1 of epoch 0, in training', str(get_path('sample')/'train'), '.png', 'lower learning rate')
    assert [p.name for p in (tmp_path/'runs'/'sample-resnet18-learned-42').iterdir()] == ['run.json']

def test_no_network_and_no_data(shell, tmp_path):
    res = shell('resizer_train', FASTAI_HOME=tmp_path/'home')
    check_one_sentence(res, 1, 'imagenette', str(tmp_path/'home'/'data'/'imagenette2'), 'https://', '--data sample')

def test_no_network_and_no_weights(shell, tmp_path):
    res = shell('resizer_train', '--data', 'sample', '--limit', 20, '--pretrained', '--arch', 'resnet18', TORCH_HOME=tmp_path/'hub')
    check_one_sentence(res, 1, 'pretrained weights of resnet18', 'random weights')

def test_pretrained_body_is_fine_tuned(shell, tmp_path):
    "With weights where torch keeps them (drawn ones here): one frozen epoch, then the asked for"
    import torch
    from torchvision.models import ResNet18_Weights, resnet18
    hub = tmp_path/'hub'/'hub'/'checkpoints'
    hub.mkdir(parents=True)
    torch.save(resnet18().state_dict(), hub/ResNet18_Weights.DEFAULT.url.rsplit('/', 1)[1])
    res = shell('resizer_train', '--data', 'sample', '--limit', 20, '--pretrained', *small, TORCH_HOME=tmp_path/'hub')
    assert res.returncode == 0, res.stderr
    run = next((tmp_path/'runs').iterdir())
    assert len((run/'metrics.csv').read_text().strip().split('\n')) == 1 + 2
    assert json.loads((run/'model'/'config.json').read_text())['pretrained'] is False

def test_folders_that_cannot_be_trained_on(shell, tmp_path):
    (tmp_path/'empty').mkdir()
    check_one_sentence(shell('resizer_train', '--data', 'empty'), 1, 'no images under')
    check_one_sentence(shell('resizer_train', '--data', 'absent'), 1, 'neither a folder')
    make_images(tmp_path/'flat', [f'{c}/{i}.png' for c in 'ab' for i in range(4)])
    check_one_sentence(shell('resizer_train', '--data', 'flat'), 1, 'no validation split', 'valid_pct')
    make_images(tmp_path/'one', [f'{s}/a/{i}.png' for s in ('train', 'val') for i in range(4)])
    check_one_sentence(shell('resizer_train', '--data', 'one'), 1, 'two classes')
    make_images(tmp_path/'noval', [f'train/{c}/{i}.png' for c in 'ab' for i in range(4)])
    check_one_sentence(shell('resizer_train', '--data', 'noval'), 1, 'no validation split')
    make_images(tmp_path/'odd', [f'{o}/{i}.png' for o in ('train/a', 'train/b', 'val/a', 'val/c') for i in range(4)])
    check_one_sentence(shell('resizer_train', '--data', 'odd'), 1, 'training has not: c')
    assert not (tmp_path/'runs').exists()

def test_traceback_only_with_debug(shell):
    res = shell('resizer_train', '--data', 'absent', '--debug')
    assert res.returncode == 1 and 'Traceback' in res.stderr

def test_own_folder_is_only_read(shell, tmp_path):
    data = make_images(tmp_path/'été 🐕', [f'{c}/{i}.png' for c in ('a b', 'ü') for i in range(6)])
    before = sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*'))
    res = shell('resizer_train', '--data', data, '--valid_pct', 0.5, *small)
    assert res.returncode == 0, res.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*')) == before
    run = json.loads(next((tmp_path/'runs').glob('*/run.json')).read_text())
    assert run['data']['classes'] == ['a b', 'ü'] and run['data']['train'] == run['data']['valid'] == 6

def test_valid_is_as_good_a_name_as_val(shell, tmp_path):
    make_images(tmp_path/'d', [f'{s}/{c}/{i}.png' for s in ('train', 'valid') for c in 'ab' for i in range(5)])
    assert shell('resizer_train', '--data', 'd', *small, '--resizer', 'pil').returncode == 0

def test_compare_ends_with_table_sentence_and_picture(shell, tmp_path):
    compare = ['resizer_compare', '--arms', 'bilinear,learned', '--seeds', 0, '--data', 'sample', '--limit', 20, *small]
    res = shell(*compare)
    assert res.returncode == 0, res.stderr
    *_, sentence, report = res.stdout.strip().split('\n')
    assert sentence.startswith('learned is') and '95 % interval' in sentence
    assert (tmp_path/report.removeprefix('report: ')).read_text().startswith('<!DOCTYPE html>')
    table = (tmp_path/'runs'/'compare-sample-resnet18'/'table.md').read_text()
    assert table.split('\n\n')[0] in res.stdout and f'\n- {sentence}\n' in table and '`resizer_compare --arms bilinear,learned --seeds 0 --data sample' in table
    again = shell(*compare)
    assert again.returncode == 0 and again.stdout.count('finished before') == 2
    check_one_sentence(shell('resizer_compare', '--arms', 'bilinear,lanczos'), 2, 'no resizer lanczos')
    check_one_sentence(shell('resizer_compare', '--seeds', 'one'), 2, '0,1,2')

def test_compare_keeps_what_it_runs_afresh(shell, tmp_path):
    compare = ['resizer_compare', '--arms', 'bilinear', '--data', 'sample', '--limit', 20, *small]
    assert shell(*compare).returncode == 0
    root = tmp_path/'runs'/'compare-sample-resnet18'
    before = (root/'sample-resnet18-bilinear-0'/'run.json').read_text()
    res = shell(*compare, '--lr', 1e-3)
    assert res.returncode == 0 and 'was started with lr 0.003, now 0.001; moved to sample-resnet18-bilinear-0.old-1' in res.stdout
    assert (root/'sample-resnet18-bilinear-0.old-1'/'run.json').read_text() == before

def test_a_line_a_cell_for_a_scheduler(shell, tmp_path):
    "The printed commands make the runs that `--collect` then finds"
    compare = ['resizer_compare', '--arms', 'bilinear,again', '--data', 'sample', '--limit', 20, *small, '--name', 'a b']
    lines = shell(*compare, '--dry_run').stdout.strip().split('\n')
    assert len(lines) == 2 and not (tmp_path/'runs').exists() and shell(*compare, '--dry_run', '--collect').stdout == ''
    for line in lines: assert shell(*shlex.split(line)).returncode == 0
    res = shell(*compare, '--collect')
    assert res.returncode == 0 and 'again is' in res.stdout and 'paired over 20 validation images of one seed' in res.stdout
    assert 'finished before' in shell(*shlex.split(lines[0])).stdout
    line, _ = shell(*compare, '--lr', 1e-3, '--dry_run').stdout.strip().split('\n')
    res = shell(*shlex.split(line))
    assert res.returncode == 0 and 'was started with lr 0.003, now 0.001; moved to sample-resnet18-bilinear-0.old-1' in res.stdout
    check_one_sentence(shell('resizer_train', '--data', 'sample', '--afresh'), 2, 'afresh goes with resume')

def test_compare_removes_no_folder_but_its_own(shell, tmp_path):
    theirs = tmp_path/'runs'/'compare-sample-resnet18'/'sample-resnet18-bilinear-0'
    theirs.mkdir(parents=True)
    (theirs/'thesis.txt').write_text('years of work')
    check_one_sentence(shell('resizer_compare', '--data', 'sample', '--limit', 20, *small), 2, 'no run of this project')
    assert (theirs/'thesis.txt').exists()

def test_the_name_of_a_gpu(monkeypatch):
    import torch
    from resizer_fastai.train import device_name
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: 'a GPU')
    assert device_name(torch.device('cuda')) == 'a GPU'

def test_bench_of_the_model(shell, tmp_path):
    "Tables of times, ratios and limits, and the command that made them; compiled models are left out on request"
    import pandas as pd
    from resizer_fastai.learner import pick_precision
    res = shell('resizer_bench', '--arch', 'resnet18', '--size', 128, '--out', 64, '--bs', 2, '--rounds', 1, '--no-compile', '--csv', 'speed.csv', '--json', 'speed.json')
    assert res.returncode == 0, res.stderr
    for o in ('| reference, fp32 ', 'joint training step over the body alone', '| stem and resize ', '`resizer_bench --arch resnet18 --size 128 --out 64 --bs 2 --rounds 1 --no-compile` on'): assert o in res.stdout
    df = pd.read_csv(tmp_path/'speed.csv')
    references = ['fp32'] + ['autocast']*(pick_precision() != 'fp32')
    assert df[['way', 'kind']].values.tolist() == [[f'reference, {p}', o] for p in references for o in ('body', 'joint')] + [['reference, run as ours', 'joint']] + [['ours', o] for o in ('body', 'joint', 'direct')] + [['ours, fused', 'joint']]
    assert (df.infer > 0).all() and (df[:-1][['train', 'infer', 'infer_1', 'memory_2', 'memory_1']] > 0).all().all()
    told, at = json.loads((tmp_path/'speed.json').read_text()), 2*len(references)+1
    pd.testing.assert_frame_equal(pd.DataFrame(told['rows']), df, check_dtype=False)
    assert told['stages'][-1]['stage'] == 'body'
    assert told['ratios']['joint training step over the body alone'] == [round(df.train[at+1]/df.train[at], 3), 0] == [round(df.train_over_body[at+1], 3), 0]
    assert told['ratios']['joint training step, times as fast as the reference run as ours'] == [round(df.train[at-1]/df.train[at+1], 3), 0]
    assert (told['ratios']['joint training step, times as fast as the reference under autocast'] is None) == (pick_precision() == 'fp32')

def test_bench_of_fewer_images_than_classes(shell):
    res = shell('resizer_bench', 'data', '--data', 'sample', '--size', 32, '--bs', 4, '--limit', 5, '--epochs', 2, '--workers', 0)
    assert res.returncode == 0 and 'ImageFolder, all on the CPU' in res.stdout, res.stderr

def test_bench_of_the_parts(shell, tmp_path):
    "Every part is left out once"
    import pandas as pd
    res = shell('resizer_bench', 'parts', '--arch', 'resnet18', '--size', 256, '--out', 128, '--bs', 2, '--rounds', 1, '--csv', 'parts.csv')
    assert res.returncode == 0, res.stderr
    assert '| `--no-channels_last` ' in res.stdout and '`resizer_bench parts --arch resnet18 --size 256 --out 128 --bs 2 --rounds 1` on' in res.stdout
    df = pd.read_csv(tmp_path/'parts.csv', keep_default_na=False).set_index('without')
    assert {'', 'again', 'channels_last', 'recomputation', 'fused optimizer', 'activations in place', 'halving by means', 'sub-pixel convolution'} <= set(df.index)
    assert df.memory_2['recomputation'] > 1.2*df.memory_2[''] == 1.2*df.memory_2['again']

def test_bench_leaves_out_what_a_body_cannot_do():
    "A transformer of one size at another one, a step of BatchNorm on one image and one pixel"
    import math
    from resizer_fastai.bench import Way, bench_model
    ours = [Way('ours', half=True)]
    with pytest.warns(UserWarning, match='direct is left out: Wrong image height'): df = bench_model('vit_b_32', 448, 224, bs=2, rounds=1, compile=False, ways=ours)
    assert df.kind.tolist() == ['body', 'joint']
    df = bench_model('resnet18', 64, 32, bs=2, rounds=1, compile=False, ways=ours)
    assert df.memory_1.map(math.isnan).tolist() == [True, True, False] and (df.memory_2 > 0).all()

def test_bench_of_epochs(shell):
    "Epochs over the data beside epochs of one batch"
    res = shell('resizer_bench', 'epochs', '--data', 'sample', '--arch', 'resnet18', '--size', 64, '--out', 32, '--bs', 8, '--limit', 40, '--workers', 0, '--epochs', 1, '--cache', 'ram')
    assert res.returncode == 0 and '| median |' in res.stdout, res.stderr

@pytest.mark.parametrize('args,says', [(['speed'], 'what is model or parts or'), (['--bs', 0], '1 or more'), (['epochs', '--cache', 'tape'], 'cache is'), (['parts', '--rounds', 0], '1 or more'), (['scaling', '--size', '448x336'], 'one number'), (['scaling', '--out', 112, '--workers', 1], 'out and workers are not for scaling'), (['data', '--no-compile'], 'compile is not for data'), (['--arch', 'resnet5'], 'no body'), (['--arch', 'vit_b_32', '--size', 192, '--out', 96], 'no training step of vit_b_32 at 96 pixels: Wrong image height'), (['data', '--epochs', 1], '2 or more'), (['parts', '--json', 'none/a.json'], 'no folder for none/a.json')])
def test_bench_usage(shell, args, says): check_one_sentence(shell('resizer_bench', *args), 2, says)
