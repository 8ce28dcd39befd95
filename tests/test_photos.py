"On real photographs."
from collections import Counter
import numpy as np, torch
from fastai.vision.all import get_image_files
from resizer_fastai.data import class_name, get_dls, split_files, wordnet_names
from resizer_fastai.learner import ResizerClassifier
from resizer_fastai.train import resizer_train

def test_photos_train_and_come_back(photos, tmp_path):
    learn = resizer_train(data='imagewoof-320', limit=20, arch='resnet18', size=96, out=48, epochs=1, bs=10, workers=0, runs=tmp_path)
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
