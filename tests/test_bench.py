"The command `resizer_bench`, what its table counts, and the script for a GPU."
import json, os, subprocess, sys
import pytest, torch
from conftest import repo
from resizer_fastai.bench import BenchModel, ReferenceResizer, resizer_bench
from resizer_fastai.resizer import Resizer

tiny = '--arch squeezenet1_1 --size 48x64 --out 32 --bs 2 --rounds 1'.split()

def test_reference_equals_resizer():
    "Output, gradients and statistics with the same weights, in float64"
    torch.manual_seed(0)
    resizer, reference = Resizer(16).double(), ReferenceResizer(16).double()
    reference.load_state_dict(dict(zip(reference.state_dict(), resizer.state_dict().values(), strict=True)))
    x, res = torch.rand(2, 3, 24, 40, dtype=torch.float64), []
    for m in (resizer, reference):
        y = m(x)
        y.square().mean().backward()
        res.append([y, *[p.grad for p in m.parameters()], *m.buffers(), m.eval()(x)])
    for a, b in zip(*res, strict=True): torch.testing.assert_close(a, b)

def test_saved_activations_order():
    "Recomputed < in place < as the paper has it"
    models = [Resizer(32, checkpoint=True), Resizer(32), ReferenceResizer(32)]
    checkpoint, learned, reference = [BenchModel(m, 'squeezenet1_1', 64, bs=2).saved() for m in models]
    assert checkpoint < learned < reference

def test_resizer_bench_model(capsys):
    "A line on the machine, then one row per model"
    resizer_bench.main(tiny)
    machine, *table = capsys.readouterr().out.splitlines()
    assert 'threads' in machine and torch.__version__ in machine
    assert [o.split()[0] for o in table[1:]] == ['body', 'reference', 'learned', 'checkpoint', 'none']
    assert all(float(o) >= 0 for row in table[1:] for o in row.split()[1:])

def test_resizer_bench_data(capsys, tmp_path, monkeypatch):
    "Every loader has a row, and nothing stays in the user's cache"
    monkeypatch.setenv('RESIZER_CACHE', str(tmp_path))
    resizer_bench.main('--what data --size 32 --bs 4 --limit 10 --num_workers 0 --rounds 1'.split())
    table = capsys.readouterr().out.splitlines()[2:]
    assert [o.split()[0] for o in table] == ['fastai', 'none', 'disk', 'device']
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('args, says', [('--what parts', 'what must be model, infer or data: got parts'),
                                        ('--arch resnet5', "no body 'resnet5'"), ('--size big', 'a size must be PIXELS')])
def test_resizer_bench_usage_error_is_one_sentence(args, says, capsys):
    with pytest.raises(SystemExit) as e: resizer_bench.main(args.split())
    assert e.value.code == 2
    assert capsys.readouterr().err.startswith(f'resizer_bench: {says}')

@pytest.mark.slow
def test_gpu_script_on_the_cpu(tmp_path):
    "All cases pass, and its JSON says so"
    env = os.environ | dict(PYTHONPATH=str(repo), PYTHONWARNINGS='ignore', CUDA_VISIBLE_DEVICES='')
    args = [sys.executable, 'tests/gpu.py', '--limit', '20', '--out', str(tmp_path/'gpu.json')]
    p = subprocess.run(args, cwd=repo, env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stdout+p.stderr
    results = json.loads((tmp_path/'gpu.json').read_text())['results']
    assert len(results) == len(p.stdout.splitlines())-1 and all(o['ok'] for o in results)
