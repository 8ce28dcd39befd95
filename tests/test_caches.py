"Decoded images on disk, in memory and on the device: the same batches, whatever happens to the cache."
import os, pickle, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from fastai.vision.all import ClassificationInterpretation, PILImage, Transform, load_learner, plt, resnet18, set_seed
from conftest import make_images
from resizer_fastai import data
from resizer_fastai.data import HWCImage, cache_images, caches, get_dls, resizer_block
from resizer_fastai.learner import resizer_learner

kept = caches[1:]

@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv('RESIZER_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('set'), [f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in ('a', 'b', 'c') for i in range(7)], (50, 40))

def loaders(folder, cache='none', workers=0, **kwargs):
    set_seed(5)
    return get_dls(folder, **dict(size=(32, 48), bs=6, cache=cache, num_workers=workers) | kwargs)

def batches(dls): return [*dls.train, *dls.valid, *dls.train]

def same(one, other): return len(one) == len(other) and all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))

def images_in(cache_dir): return sorted(cache_dir.glob('*.images'))

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cache', caches)
def test_equal_seeds_give_equal_batches(folder, cache, workers):
    want, dls = batches(loaders(folder)), loaders(folder, cache, workers)
    if cache in ('disk', 'ram'): dls.train.fake_l.num_workers = dls.valid.fake_l.num_workers = workers
    got = batches(dls)
    assert same(got, want) and [type(o) for o in got[0]] == [type(o) for o in want[0]]

def test_a_cache_is_written_once_and_read_again(folder, cache_dir, monkeypatch):
    want = batches(loaders(folder, 'disk'))
    first = {f: f.stat().st_mtime_ns for f in images_in(cache_dir)}
    assert len(first) == 2 and not list(cache_dir.glob('*.tmp'))
    monkeypatch.setattr(data, '_decode_all', lambda dl: pytest.fail('decoded again'))
    assert same(batches(loaders(folder, 'disk')), want)
    assert {f: f.stat().st_mtime_ns for f in images_in(cache_dir)} == first

@pytest.mark.parametrize('change', [dict(size=(48, 32)), dict(resize='crop'), dict(resize='pad', background='red'), dict(limit=9)])
def test_what_it_depends_on_makes_another_cache(folder, cache_dir, change):
    loaders(folder, 'disk')
    assert same(batches(loaders(folder, 'disk', **change)), batches(loaders(folder, **change)))
    assert len(images_in(cache_dir)) == 4

def test_a_changed_file_makes_another_cache(tmp_path, cache_dir):
    root = make_images(tmp_path/'set', [f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in ('a', 'b') for i in range(4)])
    loaders(root, 'disk')
    make_images(root, ['train/b/0.png'], (60, 30))
    assert same(batches(loaders(root, 'disk')), batches(loaders(root)))
    assert len(images_in(cache_dir)) == 3   # validation has not changed

def test_the_same_names_in_another_folder_make_another_cache(tmp_path):
    from PIL import Image
    for grey in (10, 200):
        for name in [f'{s}/{c}/{i}.bmp' for s in ('train', 'val') for c in 'ab' for i in range(4)]:
            file = tmp_path/f'set-{grey}'/name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (20, 20), (grey,)*3).save(file)
            os.utime(file, (1e9, 1e9))
        x, _ = loaders(tmp_path/f'set-{grey}', 'disk').valid.one_batch()
        assert torch.allclose(x, torch.full_like(x, grey/255))

def cut(f): f.write_bytes(f.read_bytes()[:-1000])
def foreign(f): f.write_bytes(b'x'*f.stat().st_size)
def half(f): f.write_bytes(f.read_bytes()[:f.stat().st_size//2].ljust(f.stat().st_size, b'\0'))
def longer(f): f.write_bytes(f.read_bytes()+b'more')
def empty(f): f.write_bytes(b'')

@pytest.mark.parametrize('harm', [cut, foreign, half, longer, empty], ids=lambda f: f.__name__)
def test_a_bad_cache_is_found_out_and_written_again(folder, cache_dir, harm):
    want = batches(loaders(folder, 'disk'))
    for f in images_in(cache_dir): harm(f)
    assert same(batches(loaders(folder, 'disk')), want)

script = '''
import sys
from resizer_fastai import data
from resizer_fastai.data import get_dls
'''
def start(folder, cache_dir, before='', after='', **kwargs):
    code = script + before + f"\ndls = get_dls({str(folder)!r}, size=(32,48), bs=6, cache='disk', num_workers=0)\nprint('made', flush=True)\n" + after
    env = os.environ | dict(RESIZER_CACHE=str(cache_dir), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

slow = '''
import time
decode = data._decode_all
def slowly(dl):
    for b in decode(dl):
        time.sleep(1)
        print('writing', flush=True)
        yield b
data._decode_all = slowly
'''

def test_two_processes_at_once_end_with_one_good_cache(folder, cache_dir):
    both = [start(folder, cache_dir, slow) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sum(s.count('writing') for s in said) == 2   # one batch of training, one of validation, by one process each
    assert len(images_in(cache_dir)) == 2 and not list(cache_dir.glob('*.tmp'))
    assert same(batches(loaders(folder, 'disk')), batches(loaders(folder)))

def test_a_process_that_is_killed_leaves_nothing_in_the_way(folder, cache_dir):
    p = start(folder, cache_dir, slow.replace('yield b', 'yield b; time.sleep(60)'))
    assert p.stdout.readline().strip() == 'writing'
    time.sleep(0.5)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not images_in(cache_dir) and list(cache_dir.glob('*.tmp'))
    assert same(batches(loaders(folder, 'disk')), batches(loaders(folder)))
    assert len(images_in(cache_dir)) == 2 and not list(cache_dir.glob('*.tmp'))

def test_a_disk_that_is_too_full_gets_one_sentence(folder, cache_dir, monkeypatch):
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=1000)))
    with pytest.raises(OSError, match='GB left: make room there'): loaders(folder, 'disk')
    assert not images_in(cache_dir)

def test_what_a_killed_process_has_left_takes_no_room(folder, cache_dir, monkeypatch):
    loaders(folder, 'disk')
    one = images_in(cache_dir)[0]
    one.rename(one.with_suffix('.tmp'))
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=0 if list(cache_dir.glob('*.tmp')) else 10**9)))
    loaders(folder, 'disk')
    assert len(images_in(cache_dir)) == 2

def test_a_disk_that_fills_up_leaves_no_half_cache(folder, cache_dir):
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))'
    p = start(folder, cache_dir, limit)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 1 and 'OSError' in err.splitlines()[-1]
    assert not images_in(cache_dir) and not list(cache_dir.glob('*.tmp'))

def test_command_says_it_in_one_sentence(folder, shell, tmp_path):
    (tmp_path/'file').touch()
    res = shell('resizer_train', '--data', folder, '--arch', 'resnet18', '--size', 32, '--out', 16, '--cache', 'disk', RESIZER_CACHE=tmp_path/'file')
    assert res.returncode == 1 and 'Traceback' not in res.stderr and 'file' in res.stderr.splitlines()[-1]

# ---------------------------------------------------------------- memory

def test_where_images_are_kept(monkeypatch, capsys):
    cuda, cpu = torch.device('cuda'), torch.device('cpu')
    monkeypatch.setattr(data, '_free_memory', lambda d: 100e9 if d.type == 'cuda' else 500e9)
    assert data._pick_memory('device', 80e9, cuda) == cuda
    assert capsys.readouterr().out == ''
    assert data._pick_memory('device', 81e9, cuda) == cpu
    assert 'kept in ram' in capsys.readouterr().out
    assert data._pick_memory('ram', 1e9, cuda) == cpu
    with pytest.raises(OSError, match='take cache disk'): data._pick_memory('ram', 501e9, cpu)

grow = '''
import gc, sys
from resizer_fastai.bench import _memory
from resizer_fastai.data import get_dls
cache, workers, *roots = sys.argv[1:]
peaks = []
for root in roots:
    dls = get_dls(root, size=448, bs=8, cache=cache, num_workers=0)
    dls.train.fake_l.num_workers = int(workers)
    most = 0
    for x, y in dls.train.new(after_batch=[]): most = max(most, _memory())
    peaks.append(most)
    del dls, x, y
    gc.collect()
print(peaks[1]-peaks[0])
'''

@pytest.mark.skipif(not Path('/proc/self/smaps').exists(), reason='memory is read from Linux')
def test_memory_does_not_grow_with_the_number_of_images_on_disk(tmp_path, cache_dir):
    from PIL import Image
    few, many = 100, 600
    for n, split, c in ((n, s, c) for n in (few, many) for s in ('train', 'val') for c in 'ab'):
        folder = tmp_path/str(n)/split/c
        folder.mkdir(parents=True)
        for i in range(n//2 if split=='train' else 1): Image.new('RGB', (8, 8), (i % 256, 0, 0)).save(folder/f'{i}.png')
    def growth(cache, workers):   # in MB
        res = subprocess.run([sys.executable, '-W', 'ignore', '-c', grow, cache, str(workers), tmp_path/str(few), tmp_path/str(many)],
                             capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert res.returncode == 0, res.stderr
        return int(res.stdout.split()[-1])/1e6
    more = (many-few)*448*448*3/1e6   # 301 MB; both take more than the few batches of 32 that are decoded ahead
    for workers in (0, 2): assert growth('disk', workers) < more/4
    assert growth('ram', 0) > more/2   # so that the measure is seen to work

def test_workers_get_the_name_of_the_cache_and_not_its_contents(folder):
    dls = loaders(folder, 'disk')
    assert len(pickle.dumps(dls.train.images)) < 1000

def test_workers_that_are_spawned(folder, cache_dir):
    code = script + f'''
import torch, multiprocessing
if __name__=='__main__':
    multiprocessing.set_start_method('spawn')
    dls = get_dls({str(folder)!r}, size=(32,48), bs=6, cache=sys.argv[1], num_workers=0)
    want = list(dls.valid)
    dls.valid.fake_l.num_workers = 2
    for a,b in zip(want, dls.valid, strict=True): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
'''
    file = cache_dir.parent/'spawned.py'
    file.write_text(code)
    for cache in ('disk', 'ram'):
        res = subprocess.run([sys.executable, '-W', 'ignore', file, cache], capture_output=True, text=True)
        assert res.returncode == 0, res.stderr

# ---------------------------------------------------------------- what fastai does with them

@pytest.mark.parametrize('cache', caches)
def test_a_learner_works_with_every_cache(folder, cache, tmp_path):
    dls = loaders(folder, cache)
    set_seed(1)
    learn = resizer_learner(dls, resnet18, size=16, pretrained=False, path=tmp_path, normalize=True)
    dls.show_batch(max_n=2)
    dls.show_batch(max_n=2, unique=True)
    with learn.no_bar():
        learn.fit(1)
        preds, targs = learn.get_preds()
        again, _ = learn.get_preds(dl=dls.test_dl(dls.valid_ds.items, num_workers=0))
        files = dls.valid_ds.items
        outs = [learn.predict(o)[2] for o in (files[0], str(files[0]), files[0].read_bytes(), PILImage.create(files[0]))]
        learn.show_results(max_n=2)
        interp = ClassificationInterpretation.from_learner(learn)
        interp.plot_top_losses(2)
    assert torch.allclose(preds, again, atol=1e-5) and len(targs) == 21
    for out in outs: assert torch.allclose(out, preds[0], atol=1e-5)
    plt.close('all')
    learn.export('learn.pkl')
    torch.save(learn.model, tmp_path/'model.pth')
    assert (tmp_path/'learn.pkl').stat().st_size < (tmp_path/'model.pth').stat().st_size + 200_000
    images = 42*32*48*3
    assert cache == 'none' or images > 190_000
    loaded = load_learner(tmp_path/'learn.pkl')
    with loaded.no_bar(): assert torch.allclose(loaded.predict(files[0])[2], preds[0], atol=1e-5)

@pytest.mark.parametrize('cache', kept)
def test_transforms_of_single_images_are_not_lost(folder, cache):
    "They get each image as they do without a cache, in `learn.tta`, too"
    class Invert(Transform):
        def encodes(self, x:HWCImage): return 255-x
    plain, inverted = [resizer_block((32, 48)).new(item_tfms=o).dataloaders(folder, bs=6, num_workers=0, shuffle=False) for o in (None, Invert())]
    want = inverted.valid.one_batch()[0]
    assert not torch.equal(want, plain.valid.one_batch()[0])
    for dls in (plain, inverted): cache_images(dls, cache)
    for dl in (inverted.valid, plain.valid.new(after_item=Invert())): assert torch.equal(dl.one_batch()[0], want)

@pytest.mark.parametrize('cache', kept)
def test_functions_of_a_loader_are_not_lost(folder, cache):
    "`create_item` and `create_batch`, which fastai takes as arguments"
    dls = cache_images(resizer_block((32, 48)).dataloaders(folder, bs=6, num_workers=0, shuffle=False), cache)
    def first_two(b): return dls.valid.create_batch(b[:2])
    def one_image(i): return dls.valid.dataset[0]
    assert len(dls.valid.new(create_batch=first_two).one_batch()[0]) == 2
    x, _ = dls.valid.new(create_item=one_image).one_batch()
    assert len(x) == 6 and torch.equal(x[0], x[5])

def test_workers_come_back(folder):
    "They are not needed while decoded images are kept"
    dls = resizer_block((32, 48)).dataloaders(folder, bs=6, num_workers=2, device='cpu')
    n = [(cache_images(dls, o), *[dl.fake_l.num_workers for dl in (*dls.loaders, dls.train.new())])[1:] for o in ('ram', 'disk', 'none')]
    assert n == [(0, 0, 0), (0, 0, 0), (2, 2, 2)]

def test_only_our_own_loaders_are_cached(folder):
    from fastai.vision.all import ImageDataLoaders, Resize
    dls = ImageDataLoaders.from_folder(folder, valid='val', item_tfms=Resize(32), bs=4, num_workers=0)
    weighted = resizer_block(32).weighted_dataloaders(folder, [1]*len(dls.train_ds), bs=4, num_workers=0)
    for o in (dls, weighted):
        with pytest.raises(ValueError, match='only the DataLoaders of get_dls'): cache_images(o, 'ram')
