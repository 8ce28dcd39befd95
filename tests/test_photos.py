"On real photographs."
from collections import Counter
import numpy as np, pytest, torch
from fastai.vision.all import set_seed
from resizer_fastai.data import check_images, class_name, get_dls, image_files, split_files, wordnet_names

@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch): monkeypatch.setenv('RESIZER_CACHE', str(tmp_path))

@pytest.mark.slow
def test_photos_train_and_come_back(photos, tmp_path):
    from resizer_fastai.learner import ResizerClassifier
    from resizer_fastai.train import resizer_train
    learn = resizer_train(data='imagewoof-320', limit=20, arch='resnet18', size=96, out=48, epochs=1, bs=10, num_workers=0, runs=tmp_path)
    assert set(learn.dls.vocab) <= set(wordnet_names.values()) and len(learn.dls.vocab) == 10
    model, preds = ResizerClassifier.from_pretrained(learn.path/'model'), np.load(learn.path/'preds.npz')
    _, _, probs = model.predict([photos/n for n in preds['names']])
    np.testing.assert_allclose(probs, preds['probs'], atol=1e-3)

def test_split_files_keeps_the_official_split_and_balances_classes(photos):
    files = image_files(photos)
    splits = [[files[i] for i in s] for s in split_files(files, limit=100)]
    assert [{f.parent.parent.name for f in s} for s in splits] == [{'train'}, {'val'}]
    assert set(Counter(map(class_name, splits[0])).values()) == {10}

def test_check_images_finds_the_known_pairs(photos):
    pairs = [('n02093754_5915', 'n02086240_9520'), ('n02087394_12539', 'n02089973_2860'), ('n02093754_4120', 'n02096294_1992')]
    files = [f for f in image_files(photos) if any(f.stem in p for p in pairs) or f.stem.endswith('00')]
    df = check_images(files)
    df['stem'] = [f.stem for f in files]
    same = [tuple(g) for _, g in df.groupby('pixels').stem if len(g) > 1]
    here = [p for p in pairs if set(p) <= set(df.stem)]
    assert sorted(map(sorted, same)) == sorted(map(sorted, here)) and (df.problem == '').all()

@pytest.mark.slow
@pytest.mark.parametrize('noisy', [1, 5, 25, 50])
def test_noisy_labels_are_in_training_only(photos, noisy):
    right, wrong = [get_dls(photos, size=8, limit=400, num_workers=0, noisy=o) for o in (None, noisy)]
    changed = [np.mean([a != b for a, b in zip(r.dataset.tls[1], w.dataset.tls[1])]) for r, w in zip(right.loaders, wrong.loaders)]
    assert abs(changed[0]-noisy/100) < 0.03+noisy/1000 and changed[0] > 0 and changed[1] == 0

@pytest.mark.parametrize('cache,num_workers', [('none', 2), ('disk', 0), ('disk', 2), ('device', 0)])
def test_photos_are_the_same_from_every_cache(photos, cache, num_workers):
    def batches(**kwargs):
        set_seed(0)
        return list(get_dls(photos, size=(64, 48), bs=8, limit=32, resize='crop', **kwargs).train)
    for a, b in zip(batches(num_workers=0), batches(cache=cache, num_workers=num_workers), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
