import os, subprocess, sys
from importlib.util import find_spec
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
import pytest

repo = Path(__file__).parent.parent
needs_timm = pytest.mark.skipif(not find_spec('timm'), reason='no timm')

@pytest.fixture(scope='session')
def photos():
    "Imagewoof at 320 pixels, where fastai keeps it"
    from fastai.data.external import URLs, fastai_path
    path = fastai_path('data')/Path(URLs.IMAGEWOOF_320).stem
    if not path.is_dir(): pytest.skip(f'no photographs: {path} is absent; resizer_fastai.data.get_path("imagewoof-320") downloads them')
    return path

server = get_context('forkserver')   # it imports once, and every command begins as a copy of it
server.set_forkserver_preload(['resizer_fastai.compare', 'resizer_fastai.bench'])

def command(name, args, cwd, env, out, err):
    "Be the console script `name`"
    for fd, file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [name, *args]
    sys.exit(entry_points(group='console_scripts')[name].load()())

@pytest.fixture
def shell(tmp_path, tmp_path_factory):
    "Run a command as a shell would, in an empty folder; nothing outside this machine can be reached"
    blocked = dict.fromkeys(['http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'], 'http://127.0.0.1:9') | dict(PYTHONWARNINGS='ignore')
    def installed(args, env):   # with what a process reads from its environment as it begins
        return subprocess.run([str(Path(sys.executable).parent/args[0]), *args[1:]], cwd=tmp_path, env=os.environ | blocked | env, capture_output=True, text=True, timeout=300)
    def run(*args, **env):
        args = list(map(str, args))
        if env: return installed(args, {k: str(v) for k, v in env.items()})
        out, err = [tmp_path_factory.mktemp('shell')/o for o in ('out', 'err')]
        p = server.Process(target=command, args=(args[0], args[1:], tmp_path, blocked, out, err))
        p.start()
        p.join(300)
        if p.is_alive(): p.kill()   # its exit code stays None
        return subprocess.CompletedProcess(args, p.exitcode, out.read_text(), err.read_text())
    return run

def make_images(root, names, size=(40, 40)):
    "Small drawn images at `root`/name for each of `names`"
    from resizer_fastai.data import draw_sample
    for i, name in enumerate(names):
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_sample(i % 10, i, max(size)).resize(size).save(file)
    return root
