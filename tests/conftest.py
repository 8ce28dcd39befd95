from importlib.util import find_spec
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

@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    "Call a command in this process, as a shell would in an empty folder: exit status, standard output, standard error"
    from importlib.metadata import entry_points
    monkeypatch.chdir(tmp_path)
    def run(name, *args):
        main, status = entry_points(group='console_scripts')[name].load(), 0
        try: main(list(map(str, args)))
        except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
        return status, *capfd.readouterr()
    return run

def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes long, and runs in `make test-all` only')

def make_images(root, names, size=(40, 40)):
    "Small drawn images at `root`/name for each of `names`"
    from resizer_fastai.data import draw_sample
    for i, name in enumerate(names):
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_sample(i % 10, i, max(size)).resize(size).save(file)
    return root
