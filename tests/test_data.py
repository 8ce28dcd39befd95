"The sample set under several processes, and learners that leave the machine they were made on."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from fastai.vision.all import get_image_files, load_learner, resnet18
from conftest import make_images
from resizer_fastai.data import _write_json, folder_report, get_dls, get_path, split_files
from resizer_fastai.learner import precision_cbs, resizer_learner
from resizer_fastai.train import data_fingerprint

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

def test_a_file_that_is_not_on_the_disk_replaces_none(tmp_path, monkeypatch):
    def full(fd): raise OSError('No space left on device')
    file = tmp_path/'run.json'
    _write_json(file, dict(a=1))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): _write_json(file, dict(a=2))
    assert json.loads(file.read_text()) == dict(a=1)

def test_a_folder_beside_the_one_that_one_is_in(tmp_path, monkeypatch):
    "Its files are under it, by whatever name it is called"
    make_images(tmp_path/'photos', [f'{c}/{i}.png' for c in 'ab' for i in range(2)])
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    dls = get_dls('../photos', valid_pct=0.5, size=32, bs=1, num_workers=0)
    assert data_fingerprint(dls.valid_ds.items, get_path('../photos')) == data_fingerprint(dls.valid_ds.items, tmp_path/'photos')
    assert folder_report('../photos').file.tolist() == ['a/0.png', 'a/1.png', 'b/0.png', 'b/1.png']

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

def test_a_limit_that_leaves_classes_out():
    "Of training images, where validation has them: it says so, and that it is the limit."
    files = [Path(split, c, '1.png') for split, classes in (('train', 'abcd'), ('val', 'bcd')) for c in classes]
    assert [len(o) for o in split_files(files)] == [4, 3]
    with pytest.raises(ValueError, match='a limit of 2 leaves classes out of training that validation has: c'): split_files(files, limit=2)
    with pytest.raises(ValueError, match='^validation has classes that training has not: b'): split_files([f for f in files if f.parts != ('train', 'b', '1.png')])
