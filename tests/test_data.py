"Images in any state and under any name, splits, and the cache across processes."
import io, os, random, signal, struct, time, warnings, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.all import DataBlock, ImageBlock, Learner, MaskBlock, PointBlock, TensorImage, Transform, load_learner, nn, set_seed
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile
from conftest import make_images
from resizer_fastai import data
from resizer_fastai.check import resizer_check
from resizer_fastai.data import (cache_images, caches, check_images, draw_sample, get_dls, image_files, read_image,
                                 resizer_block, split_files)

@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('RESIZER_CACHE', str(path))
    return path

def fork(f):
    p = get_context('fork').Process(target=f)
    p.start()
    return p

photo = draw_sample(2, 7, 96).resize((80, 60))
upright = read_image(photo)

def close(a, b, levels): return a.shape == b.shape and (a.float()-b.float()).abs().mean() < levels

def saved(ending, im=photo, **kwargs):
    file = io.BytesIO()
    im.save(file, Image.registered_extensions()[f'.{ending}'], **kwargs)
    return file.getvalue()

@pytest.mark.parametrize('mode,ending', [('1', 'png'), ('P', 'png'), ('LA', 'tif'), ('CMYK', 'jpg')])
def test_read_image_modes(mode, ending):
    file = saved(ending, photo.convert(mode))
    want = photo if mode == 'CMYK' else photo.convert(mode).convert('RGB')
    assert Image.open(io.BytesIO(file)).mode == mode and close(read_image(file), read_image(want), 12)

def test_read_image_scales_deep_grey_by_mode_alone():
    ramp = np.linspace(0, 1, 64*64).reshape(64, 64)
    for dtype, top, white in ('float32', 1, 1), ('int32', 65535, 65535), ('uint16', 65535, 65535), ('int32', 99, 65535):
        dark, light = [read_image(saved('tif', Image.fromarray((k*top*ramp).astype(dtype)))) for k in (0.98, 1)]
        assert abs(light.float().mean()-127.5*top/white) < 1 and close(dark, light, 4)
    clipped = read_image(np.array([[np.nan, -np.inf, -5, 0.5, 2, np.inf]], np.float32))
    assert clipped[0, 0].tolist() == [0, 0, 0, 128, 255, 255]

@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
def test_read_image_applies_exif(ending):
    for orientation, undo in {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = saved(ending, photo.transpose(Image.Transpose(undo)), exif=exif, quality=95)
        assert close(read_image(file), upright, 12)

def test_read_image_survives_broken_exif():
    assert close(read_image(saved('jpg', exif=b'Exif\0\0garbage that is no TIFF header')), upright, 12)
    tags = struct.pack('<HHII', 0x0112, 3, 1, 6) + struct.pack('<HHII', 0x0213, 4, 1, 0x10001)   # the second is invalid
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + tags + bytes(4)
    assert close(read_image(saved('jpg', photo.transpose(Image.ROTATE_90), exif=exif, quality=95)), upright, 12)

@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif', 'bmp'])
def test_read_image_reads_truncated_files_as_far_as_they_go(ending, tmp_path):
    file = tmp_path/f'x.{ending}'
    file.write_bytes(saved(ending)[:-len(saved(ending))//3])
    rows = slice(-8, None) if ending == 'bmp' else slice(8)   # BMP begins at the bottom
    assert check_images([file]).problem[0] == 'truncated' and close(read_image(file)[:, rows], upright[:, rows], 12)

def test_read_image_refuses_decompression_bombs(tmp_path):
    def chunk(kind, d): return struct.pack('>I', len(d)) + kind + d + struct.pack('>I', zlib.crc32(kind+d))
    for w, h in ((10_000, 9_000), (20_000, 10_000)):   # Pillow only warns of the first
        header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0))
        (tmp_path/f'{w}.png').write_bytes(b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', b'') + chunk(b'IEND', b''))
        with pytest.raises(OSError, match='decompression bomb'): read_image(tmp_path/f'{w}.png')
    assert list(check_images(image_files(tmp_path)).problem) == ['decompression bomb']*2

def mutate(file, rng):
    "Overwrite, cut off, remove or insert a few bytes"
    at, n = rng.randrange(len(file)), rng.randint(1, 40)
    noise = rng.randbytes(n)
    return rng.choice([file[:at]+noise+file[at+n:], file[:at], file[:at]+file[at+n:], file[:at]+noise+file[at:]])

def test_read_image_of_mutated_files_is_an_image_or_an_oserror():
    rng, outcomes = random.Random(0), Counter()
    files = [saved(o) for o in ('png', 'jpg', 'webp', 'tif')] + [saved('tif', compression='tiff_lzw')]
    for file in [b'P6\n'+b'1'*50, *[mutate(mutate(files[i % len(files)], rng), rng) for i in range(99)]]:
        try: x = read_image(file, size=32)
        except OSError: outcomes['error'] += 1
        else: outcomes['image'] += x.shape == (3, 32, 32) and x.dtype == torch.uint8
    assert sum(outcomes.values()) == 100 and min(outcomes.values()) > 10

def test_sample_path_is_drawn_once_by_two_processes(tmp_path):
    both = [fork(lambda: data._sample_path(tmp_path, n_train=3, n_valid=2)) for _ in range(2)]
    for p in both: p.join()
    assert [p.exitcode for p in both] == [0, 0] and [f.name for f in tmp_path.iterdir()] == ['resizer_sample-1']
    assert len(image_files(tmp_path)) == 50

def test_image_files_skips_hidden_files_and_loops(tmp_path):
    root = make_images(tmp_path/'set', ['train/a/1.png', 'train/a/.2.png', 'train/.trash/3.png', 'train/b/5.PNG'])
    for link, to in dict(up=root, alias='../b').items(): (root/'train'/'a'/link).symlink_to(to)
    (root/'train'/'c').symlink_to(make_images(tmp_path/'elsewhere', ['6.png']))
    found = [f.relative_to(root).as_posix() for f in image_files(root)]
    assert found == ['train/a/1.png', 'train/b/5.PNG', 'train/c/6.png']

def test_image_files_notes_skipped_files(tmp_path, capsys):
    root = make_images(tmp_path, ['train/cat/1.png', 'val/cat/1.png', 'train/fox/1.png'])
    (root/'val'/'fox').mkdir()
    (root/'train'/'owl').mkdir()
    for o in ('train/cat/2.raw', 'val/fox/3.RAW', 'val/fox/4', 'labels.csv'): (root/o).touch()
    image_files(root)
    said = capsys.readouterr().out
    for o in ('3 files', '2 .raw, 1 without an extension', 'folders without an image: train/owl, val/fox\n'): assert o in said

def test_valid_pct_does_not_mix_test_images_into_training(tmp_path):
    root = make_images(tmp_path, [f'{s}/{c}/{i}.png' for s in ('train', 'val', 'test') for c in ('cat', 'dog') for i in range(3)])
    with pytest.raises(ValueError, match='would mix the images of test, train, val'): get_dls(root, size=16, valid_pct=0.5)
    assert len(get_dls(root/'train', size=16, bs=2, valid_pct=0.5, num_workers=0).valid_ds) == 4

@pytest.mark.parametrize('flip', [True, False])
def test_flip_can_be_turned_off(tmp_path, flip):
    "Left and right hands: the left half of every image is white"
    for i in range(16):
        file = tmp_path/('train' if i % 4 else 'val')/'ab'[i % 2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        im = Image.new('RGB', (16, 16))
        im.paste('white', (0, 0, 8, 16))
        im.save(file)
    dls = get_dls(tmp_path, size=16, bs=8, min_scale=1, flip=flip, num_workers=0)
    x = torch.cat([x[:, 0] for _ in range(3) for x, _ in dls.train])
    assert (x[..., :8].mean((1, 2)) < x[..., 8:].mean((1, 2))-0.5).any() == flip

def test_read_image_in_threads_leaves_the_warnings_as_they_are(tmp_path):
    files = [f for f in make_images(tmp_path, [f'{i}.png' for i in range(20)]).iterdir()]
    files[0].write_bytes(files[0].read_bytes()[:-500])
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda f: read_image(f, 16), files*10))
    assert warnings.filters == before and not ImageFile.LOAD_TRUNCATED_IMAGES

def test_random_crop_flip_refuses_points_and_masks(tmp_path):
    files = list(make_images(tmp_path, [f'{i}.png' for i in range(8)]).iterdir())
    for block, get_y in ((PointBlock, lambda f: [[1., 2.]]), (MaskBlock, lambda f: np.zeros((40, 40), np.uint8))):
        dls = DataBlock((ImageBlock, block), get_y=get_y, batch_tfms=data.RandomCropFlip()).dataloaders(files, bs=2, num_workers=0)
        with pytest.raises(TypeError, match='use aug_transforms'): dls.one_batch()

@pytest.fixture
def messy(tmp_path):
    "Two classes of ten images, and one of each kind of bad file"
    names = [f'{s}/{c}/{i}.png' for s, n in (('train', 8), ('val', 2)) for c in ('cat', 'dog') for i in range(n)]
    root = make_images(tmp_path/'messy', names)
    (root/'train'/'cat'/'text.jpg').write_text('no image')
    (root/'train'/'dog'/'empty.png').touch()
    (root/'val'/'dog'/'gone.png').symlink_to(root/'nowhere.png')
    (root/'train'/'cat'/'cut.png').write_bytes((root/'train'/'cat'/'0.png').read_bytes()[:-1200])
    return root

def test_get_dls_leaves_unreadable_files_out_and_names_them(messy, capsys):
    def listing(): return {f: f.lstat().st_mtime_ns for f in [messy, *messy.rglob('*')]}
    before = listing()
    dls = get_dls(messy, size=16, bs=4, num_workers=0, cache='disk')
    said = capsys.readouterr().out
    for o in ('3 of 24 images cannot be read', 'cat/text.jpg', 'dog/empty.png', 'dog/gone.png'): assert o in said
    assert len(dls.left_out) == 3 and len(dls.train_ds) == 17 and listing() == before

def test_get_dls_splits_what_can_be_read(tmp_path, capsys):
    root = make_images(tmp_path, ['stray.png', *[f'{c}/{i}.png' for c in 'abc' for i in range(4)]])
    for i in range(13): (root/'c'/f'bad{i:02}.png').touch()
    dls = get_dls(root, size=16, bs=2, valid_pct=0.3, num_workers=0)
    assert [Counter(f.parent.name for f in d.items) for d in dls.loaders] == [dict(a=3, b=3, c=3), dict(a=1, b=1, c=1)]
    said = capsys.readouterr().out
    assert '1 of 26 images are in no class folder' in said and said.count('c/bad') == 10 and 'and 3 more' in said
    for f in root.rglob('*.png'): f.write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match='needs two classes'): get_dls(root, size=16, valid_pct=0.3, num_workers=0)

def test_check_images_looks_again_at_changed_files_only(tmp_path, monkeypatch):
    files = image_files(make_images(tmp_path, ['a/1.png', 'a/2.png']))
    old = check_images(files)
    draw_sample(5, 5, 50).save(files[0])
    looked = []
    monkeypatch.setattr(data, '_look', lambda f, look=data._look: looked.append(f) or look(f))
    new = check_images(files)
    assert looked == [files[0]] and (old.height.tolist(), new.height.tolist()) == ([40, 40], [50, 40])

@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), pct=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_split_files_is_stratified_and_depends_on_names_only(counts, pct, seed):
    files = [Path(f'set/class {c}/{i}é.png') for c, n in enumerate(counts) for i in range(n)]
    mixed = random.Random(seed).sample(files, len(files))
    (train, valid), again = [[{fs[i] for i in s} for s in split_files(fs, valid_pct=pct)] for fs in (files, mixed)]
    assert [train, valid] == again and not train & valid and len(train | valid) == len(files)
    for c, n in enumerate(counts):
        assert abs(sum(f.parent.name == f'class {c}' for f in valid)-min(max(n*pct, 1), n-1)) <= 0.5

@pytest.mark.parametrize('args,code', [(['nowhere'], 1), (['sample', '--size', '0'], 2)])
def test_resizer_check_exits_with_one_sentence(args, code, capsys):
    with pytest.raises(SystemExit) as e: resizer_check.main(args)
    assert e.value.code == code and capsys.readouterr().err.count('\n') == 1

def test_resizer_check_prints_and_writes_names_that_are_no_text(messy, tmp_path, capsys):
    try: os.rename(messy/'train'/'cat'/'text.jpg', os.fsencode(messy/'train'/'cat')+b'/\xff\xfe.jpg')
    except OSError: pytest.skip('this file system wants text')
    assert len(get_dls(messy, size=16, bs=2, num_workers=0, cache='disk').left_out) == 3
    resizer_check.main([str(messy), '--size', '64', '--out', '32', '--csv', str(tmp_path/'check.csv')])
    said = capsys.readouterr().out.encode().decode()
    for o in ('24 images of 2 classes', f'unreadable{3:24}', f'truncated{1:25}', '\\udcff\\udcfe.jpg'): assert o in said
    assert len((tmp_path/'check.csv').read_text(errors='surrogateescape').splitlines()) == 25

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    names = [f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'abc' for i in range(7)]
    return make_images(tmp_path_factory.mktemp('set'), names, (50, 40))

def loaders(folder, cache='none', num_workers=0, **kwargs):
    set_seed(5)
    return get_dls(folder, **dict(size=(32, 48), bs=6, cache=cache, num_workers=num_workers) | kwargs)

def batches(dls): return [*dls.train, *dls.valid, *dls.train]
def same(one, other): return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y))

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('cache', caches)
def test_equal_seeds_give_equal_batches(folder, cache, num_workers):
    assert same(batches(loaders(folder, cache, num_workers)), batches(loaders(folder)))

def test_disk_cache_depends_on_files_and_how_they_are_read(tmp_path, cache_dir):
    names = [f'{s}/{c}/{i}.bmp' for s in ('train', 'val') for c in 'ab' for i in range(2)]
    changes = dict(none={}, size=dict(size=(48, 32)), crop=dict(resize='crop'), limit=dict(limit=2), time={}, name={},
                   pad=dict(resize='pad', background='red'))
    for i, (what, kwargs) in enumerate(changes.items()):
        root = make_images(tmp_path/('other' if what == 'name' else 'set'), names[::-1] if what == 'time' else names)
        for f in root.rglob('*.bmp'): os.utime(f, (1e9, 2e9 if what == 'time' else 1e9))
        for _ in range(2): assert same(batches(loaders(root, 'disk', **kwargs)), batches(loaders(root, **kwargs)))
        assert len(list(cache_dir.glob('*.npy'))) == i+1

def slowly(*args, decode=data._decode):
    for b in decode(*args):
        yield b
        time.sleep(0.5)

def test_disk_cache_is_written_by_one_of_two_processes(folder, cache_dir, monkeypatch):
    monkeypatch.setattr(data, '_decode', lambda *args: (cache_dir/f'{os.getpid()}.decoded').touch() or slowly(*args))
    both = [fork(lambda: loaders(folder, 'disk')) for _ in range(2)]
    for p in both: p.join()
    assert [p.exitcode for p in both] == [0, 0] and len(list(cache_dir.glob('*.decoded'))) == 1
    assert same(batches(loaders(folder, 'disk')), batches(loaders(folder)))

def test_disk_cache_survives_a_killed_process(folder, cache_dir, monkeypatch):
    monkeypatch.setattr(data, '_decode', slowly)
    p = fork(lambda: loaders(folder, 'disk'))
    while p.is_alive() and not list(cache_dir.glob('.*.npy')): time.sleep(0.01)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert not list(cache_dir.glob('[!.]*.npy')) and list(cache_dir.glob('.*.npy'))
    assert same(batches(loaders(folder, 'disk')), batches(loaders(folder))) and not list(cache_dir.glob('.*.npy'))

def test_disk_cache_on_a_full_disk_leaves_nothing(folder, cache_dir, monkeypatch):
    import resource
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(OSError, match='too large'): loaders(folder, 'disk')
    p = fork(fill)
    p.join()
    assert p.exitcode == 0 and {f.suffix for f in cache_dir.iterdir()} == {'.json', '.lock'}
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=1000)))
    with pytest.raises(OSError, match='GB left: make room there'): loaders(folder, 'disk')

@pytest.mark.slow
def test_spawned_workers_read_the_disk_cache(tmp_path):
    root = make_images(tmp_path, [f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'ab' for i in range(2)])
    valid = loaders(root, 'disk').valid
    want = list(valid)
    for f in root.rglob('*.png'): f.unlink()   # only the cache has them now
    set_start_method('spawn', force=True)
    try: assert same(list(valid.new(num_workers=1)), want)
    finally: set_start_method(None, force=True)

def test_learner_is_exported_without_the_cache(folder, tmp_path):
    dls = loaders(folder, 'device')
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*48, 3))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    learn.export('learn.pkl')
    assert (tmp_path/'learn.pkl').stat().st_size < 150_000 < 42*3*32*48
    file, loaded = dls.valid_ds.items[0], load_learner(tmp_path/'learn.pkl')
    with learn.no_bar(), loaded.no_bar():
        want = learn.predict(file)[2]
        for o in (file, str(file), file.read_bytes(), Image.open(file)):
            assert torch.allclose(loaded.predict(o)[2], want)

@pytest.mark.parametrize('cache', caches[1:])
def test_cached_images_pass_through_item_transforms(folder, cache):
    class Invert(Transform):
        def encodes(self, x:TensorImage): return x.neg_().add_(255)
    dls = resizer_block((32, 48)).new(item_tfms=Invert()).dataloaders(folder, bs=6, num_workers=0)
    want = dls.valid.one_batch()[0]
    cache_images(dls, cache)
    for _ in range(2): assert torch.equal(dls.valid.one_batch()[0], want)   # in place, and the cache stays as it is
