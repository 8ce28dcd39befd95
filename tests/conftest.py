import os, subprocess, sys
from pathlib import Path
import pytest

repo = Path(__file__).parent.parent

@pytest.fixture(scope='session')
def photos():
    "Imagewoof at 320 pixels, where fastai keeps it"
    from fastai.data.external import URLs, fastai_path
    path = fastai_path('data')/Path(URLs.IMAGEWOOF_320).stem
    if not path.is_dir(): pytest.skip(f'no photographs: {path} is absent; resizer_fastai.data.get_path("imagewoof-320") downloads them')
    return path

@pytest.fixture
def shell(tmp_path):
    "Run a command as a shell would, in an empty folder; nothing outside this machine can be reached"
    blocked = dict.fromkeys(['http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'], 'http://127.0.0.1:9')
    def run(*args, **env):
        command = [str(Path(sys.executable).parent/args[0]), *map(str, args[1:])]
        env = os.environ | blocked | dict(PYTHONWARNINGS='ignore') | {k: str(v) for k, v in env.items()}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    return run

def make_images(root, names, size=(40, 40)):
    "Small drawn images at `root`/name for each of `names`"
    from resizer_fastai.data import draw_sample
    for i, name in enumerate(names):
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_sample(i % 10, i, max(size)).resize(size).save(file)
    return root
