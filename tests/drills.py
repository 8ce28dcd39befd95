"""Drills that take minutes, by hand: `make drills` kills runs at random moments, watches the memory of a long run and fills the
disk. It needs Linux, and writes the figures to results/reliability.md."""
import io, os, platform, random, re, resource, signal, subprocess, time
from datetime import date
from multiprocessing import get_context
from pathlib import Path
import fastai, pandas as pd, pytest, torch
from conftest import repo
from resizer_fastai.bench import resizer_bench
from resizer_fastai.check import resizer_check
from resizer_fastai.compare import resizer_compare
from resizer_fastai.data import command_parser, image_files, read_image
from resizer_fastai.ship import load_model, predict_files, resizer_demo, resizer_export, resizer_predict
from resizer_fastai.train import device_name, read_run, resizer_train, versions

small = dict(data='sample', limit=40, arch='resnet18', size=64, out=32, bs=10, num_workers=0, precision='fp32', epochs=3)
tiny = dict(data='sample', limit=20, arch='squeezenet1_1', size=64, out=32, bs=10, num_workers=0, precision='fp32', epochs=2)
minutes = float(os.environ.get('MINUTES', 20))

@pytest.fixture(scope='module', autouse=True)
def report():
    "Lines for results/reliability.md"
    lines = []
    yield lines
    v = versions()
    made = f'`make drills`, {date.today()}, {device_name(torch.device("cpu"))}, {os.cpu_count()} cores, {platform.system()}; '
    made += ', '.join(f'{k} {v[k]}' for k in ('resizer_fastai', 'commit', 'python', 'torch', 'fastai'))
    (repo/'results'/'reliability.md').write_text('\n'.join(['# What the drills found', '', made+'.', '', *lines, '']))

def start(f, *args, **kwargs):
    "A process of its own, which begins with everything imported; its output goes to a file"
    def child():
        out = os.open(kwargs.pop('log'), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        torch.set_num_threads(1)
        f(*args, **kwargs)
    p = get_context('fork').Process(target=child)
    p.start()
    return p

def finished(p):
    p.join()
    assert p.exitcode==0
    return p

def weights(run): return (run/'model'/'model.safetensors').read_bytes()
def rows(run): return pd.read_csv(run/'metrics.csv').drop(columns='seconds').values.tolist()

plans = [dict(n=11, options=dict(cache='none')), dict(n=11, options=dict(cache='disk')), dict(n=3, options=dict(recipe='muon', epochs=2, limit=20))]

def test_kills(tmp_path, report):
    "SIGKILL at random moments, every third run twice: then `--resume` gives the weights and metrics of a run without"
    rng, killed, writing, n_runs = random.Random(0), 0, 0, 0
    for i, plan in enumerate(plans):
        options = small | dict(runs=tmp_path) | plan['options']
        begin = time.time()
        finished(start(resizer_train, **options, name=f'whole-{i}', log=tmp_path/'log'))
        took, whole = time.time()-begin, tmp_path/f'whole-{i}'
        for j in range(plan['n']):
            run = tmp_path/f'killed-{i}-{j}'
            for _ in range(1+(j%3==0)):
                p = start(resizer_train, **options, name=run.name, resume=True, log=tmp_path/'log')
                p.join(rng.uniform(0, took))
                if p.is_alive():
                    os.kill(p.pid, signal.SIGKILL)
                    killed += 1
                p.join()
                writing += any(run.rglob('.*'))
            finished(start(resizer_train, **options, name=run.name, resume=True, log=tmp_path/'log'))
            assert weights(run)==weights(whole) and rows(run)==rows(whole) and len(rows(run))==options['epochs']
            n_runs += 1
    report += [f'**Kills.** {n_runs} runs (`sample`, ResNet-18, 64 px; {plans[1]["n"]} of them with `--cache disk`, {plans[2]["n"]} with `--recipe muon`), killed '
               f'{killed} times with SIGKILL at random moments, {writing} times while a file was being written. Resumed, all {n_runs} ended with the weights of a run that was '
               'not killed, byte for byte, and with its rows of metrics.', '']

def use_of(pid):
    "Resident memory in MB, and open files"
    rss = next(o for o in Path(f'/proc/{pid}/status').read_text().splitlines() if o.startswith('VmRSS'))
    return int(rss.split()[1])/1000, len(os.listdir(f'/proc/{pid}/fd'))

def soak(root, end):
    "Train, validate, predict and export, again and again"
    photos = image_files(Path.home()/'.fastai/data/resizer_sample-1/val')[:40]
    while time.time()<end:
        learn = resizer_train(**tiny, runs=root, name='soak', overwrite=True)
        with learn.no_bar(): learn.validate()
        predict_files(load_model(root/'soak', 'cpu'), photos, bs=8, num_workers=2)
        resizer_export(root/'soak', pt2=str(root/'model.pt2'))

def test_memory_of_a_long_run(tmp_path, report):
    "Flat within 2 % after the first tenth"
    seen, begin = [], time.time()
    p = start(soak, tmp_path, begin+60*minutes, log=tmp_path/'log')
    while p.is_alive():
        time.sleep(2)
        if p.is_alive(): seen.append((time.time()-begin, *use_of(p.pid)))
    assert p.exitcode==0
    df = pd.DataFrame(seen, columns=['seconds', 'mb', 'files'])
    tenth = (df.seconds/(6*minutes)).astype(int).clip(upper=9)
    peak, files = df.groupby(tenth).mb.max(), df.groupby(tenth).files.max()
    n = (tmp_path/'log').read_text().count('see ')
    report += [f'**Memory.** {minutes:.0f} minutes in one process, {n} times train, validate, predict and export. Most resident memory in each tenth, MB: '
               f'{", ".join(f"{o:.0f}" for o in peak)}. Most open files in each tenth: {", ".join(map(str, files))}.', '']
    assert peak.iloc[-1]<=1.02*peak.iloc[1] and files.iloc[-1]<=files.iloc[1]

def limited(n_bytes, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    resizer_train.main([f'--{k}' if v is True else f'--{k}={v}' for k, v in options.items()])

def test_disk_that_is_full(tmp_path, report):
    "No file may be larger, from almost nothing to almost enough: one sentence, and with room the run goes on to the same weights"
    finished(start(resizer_train, **tiny, runs=tmp_path, name='whole', log=tmp_path/'log'))
    stopped = {}
    for kb in (1, 3, 10, 30, 100, 200, 1000, 2000, 2500, 5000, 8000, 10000):
        log = tmp_path/f'log-{kb}'
        p = start(limited, kb*1000, **tiny, runs=tmp_path, name=f'full-{kb}', log=log)
        p.join()
        said = log.read_text()
        assert p.exitcode in (0, 1) and 'Traceback' not in said
        if p.exitcode==1:
            assert 'cannot write' in said and not list((tmp_path/f'full-{kb}').rglob('.*')), said
            stopped[kb] = Path(said.split('cannot write ')[1].split(',')[0].split(':')[0]).name
        finished(start(resizer_train, **tiny, runs=tmp_path, name=f'full-{kb}', resume=True, log=log))
        assert weights(tmp_path/f'full-{kb}')==weights(tmp_path/'whole')
    report += [f'**Full disk.** A limit on the size of files of {", ".join(f"{k} kB" for k in stopped)} stopped runs while they wrote {", ".join(dict.fromkeys(stopped.values()))}, each with '
               'one sentence; resumed without the limit, all ended with the same weights.', '']

@pytest.mark.skipif(os.geteuid()!=0, reason='mounting a small disk needs root')
def test_small_disk(tmp_path, report):
    "A real disk without room, for a checkpoint and for the end"
    finished(start(resizer_train, **tiny, runs=tmp_path, name='whole', log=tmp_path/'log'))
    stopped = []
    for mb in (4, 8, 16, 20, 24, 28):
        disk = tmp_path/f'disk-{mb}'
        disk.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={mb}m', 'tmpfs', disk]).returncode: pytest.skip('no disk can be mounted here')
        try:
            p = start(limited, resource.RLIM_INFINITY, **tiny, runs=disk, name='run', log=tmp_path/f'log-{mb}')
            p.join()
            said = (tmp_path/f'log-{mb}').read_text()
            assert p.exitcode in (0, 1) and 'Traceback' not in said
            if p.exitcode==1:
                assert 'cannot write' in said and 'No space left' in said and not list((disk/'run').rglob('.*')), said
                stopped.append(f'{mb} MB ({Path(said.split("cannot write ")[1].split(",")[0].split(":")[0]).name})')
            subprocess.run(['mount', '-o', 'remount,size=200m', disk], check=True)
            finished(start(resizer_train, **tiny, runs=disk, name='run', resume=True, log=tmp_path/f'log-{mb}'))
            assert weights(disk/'run')==weights(tmp_path/'whole')
        finally: subprocess.run(['umount', disk])
    assert stopped
    report += [f'**Small disk.** On disks of {", ".join(stopped)} the same run stopped at the file in brackets with one sentence; with room it went on to the same weights.', '']

def test_mutated_images(report):
    "An image, or an OSError"
    from test_data import mutate, saved
    rng, n, read = random.Random(1), 2400, 0
    files = [saved(o) for o in ('png', 'jpg', 'webp', 'tif', 'bmp', 'gif')] + [saved('tif', compression='tiff_lzw')]
    for i in range(n):
        try: read += read_image(mutate(mutate(files[i % len(files)], rng) or b'x', rng)).ndim==3
        except OSError: pass
    report += [f'**Mutated images.** {n} files of many formats with bytes changed, cut or repeated: {read} were read, the others gave an OSError and nothing else.', '']

values = ['', '-1', '0', '3', '1e9', 'nan', 'a', 'ä', '../x', '/dev/null', 'a b', '--x', 'sample', '64', '32x48', 'learned', '1,2', '[]', '$(x)', '*']

def test_random_command_lines(report, monkeypatch, tmp_path, capfd):
    "One sentence, never a traceback; whatever would train is stopped there"
    def stop(*args, **kwargs): raise ValueError('it would train')
    for module in ('train', 'compare'): monkeypatch.setattr(f'resizer_fastai.{module}.train_run', stop)
    monkeypatch.setattr('resizer_fastai.bench.BenchModel.__init__', stop)
    monkeypatch.setattr('resizer_fastai.bench.bench_data', stop)
    monkeypatch.setattr('resizer_fastai.learner.snapshot_download', stop)
    monkeypatch.setattr('sys.stdin', io.StringIO(''))
    monkeypatch.chdir(tmp_path)
    rng, n, statuses = random.Random(2), 450, []
    commands = [resizer_bench, resizer_check, resizer_compare, resizer_demo, resizer_export, resizer_predict, resizer_train]
    for _ in range(n):
        f = rng.choice(commands)
        flags = re.findall(r'--(?!help|debug)[\w-]+', command_parser(f).format_help())
        argv = [rng.choice(values) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(0, 5)): argv += rng.choice([[f'{rng.choice(flags)}={rng.choice(values)}'], [rng.choice(flags), rng.choice(values)]])
        try: f.main(argv)
        except SystemExit as e: statuses.append(e.code)
        else: statuses.append(0)
        assert 'Traceback' not in capfd.readouterr().err, argv
    report += [f'**Command lines.** {n} random ones for {len(commands)} commands: no traceback; exit statuses ' + ', '.join(f'{k} ({statuses.count(k)})' for k in sorted(set(statuses))) + '.', '']
