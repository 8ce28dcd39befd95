"Every notebook, run the way `nbdev_test` runs it."
import pytest
from conftest import repo

notebooks = sorted(p for p in (repo/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)
def test_notebook(notebook, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')   # as test_nb does, which would leave it set for the tests after this one
    test = pytest.importorskip('nbdev.test', reason='notebooks are tested where nbdev is installed')
    from nbdev.config import get_config
    passed, _ = test.test_nb(notebook, skip_flags=get_config(path=repo).tst_flags.split(), basepath=repo)
    assert passed, f'{notebook.name} failed; its traceback stands above'
