"Drills that take minutes, run by hand with `make drills`: kills at random moments, a long run's memory, a disk that fills up."
import os, random, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest
from resizer_fastai.train import read_run

small = '--data sample --limit 20 --arch squeezenet1_1 --size 64 --out 32 --bs 10 --num_workers 0 --precision fp32 --epochs 4'.split()

def process(*args, cwd, **kwargs):
    command = [Path(sys.executable).parent/'resizer_train', *small, *map(str, args)]
    env = os.environ | dict(PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=env, **kwargs)

def weights(run): return (run/'model'/'model.safetensors').read_bytes()

def test_kills(tmp_path, n=20):
    "SIGKILL at a random moment, again and again, until the run is finished: the same weights as without"
    whole = process('--name', 'whole', cwd=tmp_path)
    whole.communicate()
    runs, rng, killed = tmp_path/'runs', random.Random(0), 0
    for i in range(n):
        args = ['--name', f'killed-{i}', '--resume']
        while not (p := process(*args, cwd=tmp_path)).poll():
            try: p.communicate(timeout=rng.uniform(5, 20))
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                p.communicate()
                killed += 1
                continue
            break
        assert p.returncode == 0 and weights(runs/f'killed-{i}') == weights(runs/'whole')
    print(f'{n} runs, killed {killed} times: the same weights')

def test_memory_of_a_long_run(tmp_path, minutes=8):
    "Resident memory after the first minute and at the end"
    p = process('--epochs', 10_000, cwd=tmp_path)
    start, seen = time.time(), []
    while time.time()-start < 60*minutes and p.poll() is None:
        time.sleep(10)
        seen.append(int(next(o for o in Path(f'/proc/{p.pid}/status').read_text().splitlines() if o.startswith('VmRSS')).split()[1])/1000)
    os.killpg(p.pid, signal.SIGKILL)
    print(f'resident memory, MB: {seen[6]:.0f} after a minute, {seen[-1]:.0f} after {minutes}')
    assert seen[-1] < 1.1*seen[6]

@pytest.mark.parametrize('megabytes', [1, 30, 60, 100])
def test_disk_that_is_full(tmp_path, megabytes):
    "No file may be larger: one sentence, and once there is room the run goes on to the same weights"
    process('--name', 'whole', cwd=tmp_path).communicate()
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes*10**6, -1))
    p = process('--name', 'full', cwd=tmp_path, preexec_fn=limit)
    err = p.communicate()[1]
    assert p.returncode in (0, 1) and 'Traceback' not in err
    assert p.returncode == 0 or read_run(tmp_path/'runs/full')['metrics'] is None
    assert process('--name', 'full', '--resume', cwd=tmp_path).wait() == 0
    assert weights(tmp_path/'runs/full') == weights(tmp_path/'runs/whole')
