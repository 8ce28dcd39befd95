"The sample set under several processes, and learners that leave the machine they were made on."
import subprocess, sys
import pytest, torch
from fastai.vision.all import get_image_files, load_learner, resnet18
from resizer_fastai.data import get_dls, get_path
from resizer_fastai.learner import precision_cbs, resizer_learner

def test_two_processes_draw_one_whole_set(tmp_path):
    code = f"from resizer_fastai.data import _sample_path; print(_sample_path({str(tmp_path)!r}, n_train=6, n_valid=2))"
    both = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {p.communicate()[0].strip() for p in both}
    assert [p.returncode for p in both] == [0, 0] and len(paths) == 1
    assert len(get_image_files(paths.pop())) == 80
    assert len(list(tmp_path.iterdir())) == 1

def test_a_drawing_that_is_stopped_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    import resizer_fastai.data as data
    def stop(draw, items, **kwargs):
        for o in items[:3]: draw(o)
        assert not [p for p in tmp_path.iterdir() if not p.name.startswith('.')]
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'parallel', stop)
    with pytest.raises(KeyboardInterrupt): data._sample_path(tmp_path)
    assert list(tmp_path.iterdir()) == []

def test_export_and_load_learner(tmp_path):
    dls = get_dls('sample', size=64, bs=10, limit=20, num_workers=0)
    learn = resizer_learner(dls, resnet18, size=32, pretrained=False, path=tmp_path, cbs=precision_cbs('bf16'))
    with learn.no_bar(): learn.fit(1)
    learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    file = dls.valid_ds.items[0]
    with learn.no_bar(), again.no_bar(): a, b = learn.predict(file), again.predict(file)
    assert a[0] == b[0] and torch.allclose(a[2], b[2], atol=1e-4)

def test_learner_writes_beside_its_path_and_not_into_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = resizer_learner(get_dls('sample', size=64, bs=10, limit=20, num_workers=0), resnet18, size=32, pretrained=False)
    learn.save('weights')
    assert (tmp_path/'models'/'weights.pth').exists() and not (get_path('sample')/'models').exists()
