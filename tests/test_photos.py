"On real photographs."
from collections import Counter
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.all import get_image_files, set_seed
from resizer_fastai.data import class_name, get_dls, resizer_check, split_files, wordnet_names
from resizer_fastai.learner import ResizerClassifier
from resizer_fastai.train import resizer_train

def test_photos_train_and_come_back(photos, tmp_path):
    learn = resizer_train(data='imagewoof-320', limit=20, arch='resnet18', size=96, out=48, epochs=1, bs=10, workers=0, precision='fp32', runs=tmp_path)
    assert set(learn.dls.vocab) <= set(wordnet_names.values()) and len(learn.dls.vocab) == 10
    model = ResizerClassifier.from_pretrained(learn.path/'model')
    preds = np.load(learn.path/'preds.npz')
    _, _, probs = model.predict([photos/n for n in preds['names']])
    np.testing.assert_allclose(probs, preds['probs'], atol=1e-3)

def test_official_split_and_balance(photos):
    files = get_image_files(photos).sorted()
    train, valid = split_files(files, limit=100)
    assert {files[i].parent.parent.name for i in train} == {'train'} and {files[i].parent.parent.name for i in valid} == {'val'}
    assert set(Counter(class_name(files[i]) for i in train).values()) == {10}

def test_two_workers_give_the_same_batches_as_none(photos):
    batch = lambda n: get_dls(photos, size=64, bs=8, limit=16, num_workers=n).valid.one_batch()
    for a, b in zip(batch(0), batch(2)): assert torch.equal(a, b)

def test_check_finds_the_pairs_that_the_set_is_known_for(photos, tmp_path, monkeypatch):
    monkeypatch.setenv('RESIZER_CACHE', str(tmp_path))
    files = [p for p in (photos/s for s in ('train', 'val')) for p in p.rglob('*.JPEG')]
    pairs = [{'n02093754_5915', 'n02086240_9520'}, {'n02087394_12539', 'n02089973_2860'}, {'n02093754_4120', 'n02096294_1992'}]
    here = [p for p in pairs if p <= {f.stem for f in files}]
    df = resizer_check(photos)
    found = [set(map(lambda f: Path(f).stem, (a, b))) for a, b in zip(df.file, df.same_as) if b]
    assert sorted(map(sorted, found)) == sorted(map(sorted, here))
    if len(files) == 12954: assert len(found) == 3
    assert (df.problem == '').all() and set(df.split) == {'train', 'val'}

@pytest.mark.parametrize('noisy', [1, 5, 25, 50])
def test_noisy_labels_are_in_training_only(photos, noisy):
    right, wrong = get_dls(photos, size=8, limit=400, num_workers=0), get_dls(photos, size=8, limit=400, num_workers=0, noisy=noisy)
    changed = [np.mean([a != b for a, b in zip(r.dataset.tls[1], w.dataset.tls[1])]) for r, w in zip(right.loaders, wrong.loaders)]
    assert abs(changed[0]-noisy/100) < 0.03+noisy/1000 and changed[0] > 0 and changed[1] == 0
    assert right.vocab == wrong.vocab

def test_cached_photos_are_the_same_photos(photos, tmp_path, monkeypatch):
    monkeypatch.setenv('RESIZER_CACHE', str(tmp_path))
    def batches(cache):
        set_seed(0)
        return list(get_dls(photos, size=(64, 48), bs=8, limit=32, cache=cache, num_workers=0, resize='crop').train)
    for cache in ('disk', 'ram', 'device'):
        for a, b in zip(batches('none'), batches(cache), strict=True): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
