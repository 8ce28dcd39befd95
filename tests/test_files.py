"Image files in whatever state they are in, under whatever name."
import os, struct, zlib
from collections import Counter
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image, features
from fastai.vision.all import TensorImage
from conftest import make_images
from resizer_fastai.data import (RandomCropFlip, check_images, draw_sample, get_dls, image_files, read_image, resizer_check,
                                 resize_ways, split_files)

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv('RESIZER_CACHE', str(tmp_path_factory.mktemp('cache')))

def close(a, b, levels): return (a.float()-b.float()).abs().mean() < levels

photo = draw_sample(2, 7, 96).resize((80, 60))
upright = read_image(photo)

# ---------------------------------------------------------------- encodings

formats = dict(jpg=12, jpeg=12, JPG=12, png=0.1, PNG=0.1, bmp=0.1, tif=0.1, tiff=0.1, webp=12, avif=14, gif=25, ppm=0.1)

@pytest.mark.parametrize('ending,levels', formats.items())
def test_formats(ending, levels, tmp_path):
    if ending in ('webp', 'avif') and not features.check(ending): pytest.skip(f'this Pillow has no {ending}')
    file = tmp_path/f'photo.{ending}'
    photo.save(file)
    assert image_files(tmp_path) == [file]
    assert close(read_image(file), upright, levels)

@pytest.mark.parametrize('mode', ['L', 'CMYK', 'P', '1', 'RGBA', 'LA', 'I;16'])
def test_modes(mode, tmp_path):
    if mode == 'I;16': im = Image.fromarray((np.asarray(photo.convert('L')).astype(np.uint16) << 8))
    else: im = photo.convert(mode)
    file = tmp_path/f'photo.{"jpg" if mode == "CMYK" else "tif" if mode == "LA" else "png"}'
    im.save(file, **dict(quality=95) if mode == 'CMYK' else {})
    with Image.open(file) as opened: assert opened.mode == mode
    want = read_image(photo.convert(dict(LA='L', RGBA='RGB', CMYK='RGB').get(mode, 'L' if mode == 'I;16' else mode)).convert('RGB'))
    x = read_image(file)
    assert x.dtype == torch.uint8 and x.shape == (60, 80, 3)
    assert close(x, want, 12 if mode == 'CMYK' else 1)

def test_what_is_no_number_is_black(tmp_path):
    x = np.asarray(photo.convert('L'))/np.float32(255)
    holes = x.copy()
    holes[:2], holes[2] = np.nan, np.inf
    a, b = [read_image(Image.fromarray(o)) for o in (x, holes)]
    assert not b[:3].any() and torch.equal(a[3:], b[3:]) and b.max() > 100

def test_what_is_transparent_is_laid_over_the_background(tmp_path):
    clear, palette = Image.new('RGBA', (8, 8), (255, 0, 0, 0)), Image.new('P', (8, 8), 3)
    palette.putpalette([0]*9 + [255, 0, 0])
    clear.save(tmp_path/'alpha.png')
    palette.save(tmp_path/'palette.png', transparency=3)
    for name in ('alpha.png', 'palette.png'):
        assert read_image(tmp_path/name)[0, 0].tolist() == [124, 116, 104]
        assert read_image(tmp_path/name, background='blue')[0, 0].tolist() == [0, 0, 255]
    half = Image.new('RGBA', (8, 8), (255, 0, 0, 128))
    assert abs(read_image(half, background='white')[0, 0].int()-torch.tensor([255, 127, 127])).max() <= 1

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
def test_exif_rotation_is_applied(orientation, ending, tmp_path):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}   # Pillow's transposition that undoes each
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = photo if orientation == 1 else photo.transpose(Image.Transpose(back[orientation]))
    lying.save(tmp_path/f'x.{ending}', exif=exif, quality=95)
    x = read_image(tmp_path/f'x.{ending}')
    assert x.shape == upright.shape and close(x, upright, 12)

@pytest.mark.parametrize('ending', ['jpg', 'png'])
def test_broken_exif_does_not_matter(ending, tmp_path):
    photo.save(tmp_path/f'x.{ending}', exif=b'Exif\0\0garbage that is no TIFF header')
    assert close(read_image(tmp_path/f'x.{ending}'), upright, 12)
    assert check_images([tmp_path/f'x.{ending}']).problem[0] == ''

def test_exif_that_cannot_be_written_back_does_not_matter(tmp_path):
    "A photograph is turned although another of its tags has a type that this tag does not have"
    tags = struct.pack('<HHII', 0x0112, 3, 1, 6) + struct.pack('<HHII', 0x0213, 4, 1, 0x10001)   # orientation, YCbCrPositioning
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + tags + bytes(4)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'x.jpg', exif=exif, quality=95)
    assert check_images([tmp_path/'x.jpg']).problem[0] == ''
    assert close(read_image(tmp_path/'x.jpg'), upright, 12)

@pytest.mark.parametrize('file', [b'P6\n'+b'1'*50, b'no image', b''])
def test_what_cannot_be_read_is_an_oserror(file, tmp_path):
    "Whatever Pillow raises, of a file as of its bytes"
    (tmp_path/'x.ppm').write_bytes(file)
    for o in (file, tmp_path/'x.ppm'):
        with pytest.raises(OSError): read_image(o)

@pytest.mark.parametrize('valid_pct,bad,says', [(0.5, 'abv', 'have none'), (None, 'abv', 'have none'), (None, 'v', 'no validation images are left')])
def test_images_of_which_none_can_be_read(valid_pct, bad, says, tmp_path):
    "Such as pointers to files that were never fetched"
    files = [f'{split}/{c}/{i}.jpg' for split in ('train', 'val') for c in 'ab' for i in range(2)]
    make_images(tmp_path, files)
    for o in files:
        if bad != 'v' or o.startswith('val'): (tmp_path/o).write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match=says): get_dls(tmp_path, size=16, valid_pct=valid_pct, num_workers=0)

@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tif', 'bmp'])
def test_truncated_files(ending, tmp_path):
    file = tmp_path/f'x.{ending}'
    photo.save(file)
    file.write_bytes(file.read_bytes()[:-len(file.read_bytes())//3])
    problem = check_images([file]).problem[0]
    assert problem in ('truncated', 'unreadable')
    assert problem == 'truncated' or ending == 'webp'   # of which nothing can be had
    if problem == 'truncated':
        x = read_image(file)
        rows = slice(-8, None) if ending == 'bmp' else slice(8)   # which begins at the bottom
        assert x.shape == upright.shape and close(x[rows], upright[rows], 12)

def test_a_decompression_bomb_is_refused_and_the_limit_stays(tmp_path, monkeypatch):
    def png(w, h):
        chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t+d))
        return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path/'over.png').write_bytes(png(10_000, 9_000))     # Pillow only warns of this one
    (tmp_path/'twice.png').write_bytes(png(20_000, 10_000))
    assert list(check_images(image_files(tmp_path)).problem) == ['decompression bomb']*2
    with pytest.raises(OSError, match='decompression bomb'): read_image(tmp_path/'over.png')
    assert Image.MAX_IMAGE_PIXELS == limit
    photo.save(tmp_path/'good.jpg')
    assert check_images([tmp_path/'good.jpg']).problem[0] == ''
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert check_images([tmp_path/'good.jpg']).problem[0] == 'decompression bomb'
    with pytest.raises(OSError, match='decompression bomb'): read_image(tmp_path/'good.jpg')

# ---------------------------------------------------------------- sizes

sides = st.integers(1, 90)

@settings(max_examples=60, deadline=None)
@given(w=sides, h=sides, size=st.tuples(sides, sides), way=st.sampled_from(sorted(resize_ways)))
@example(w=1, h=90, size=(1, 90), way='crop')
@example(w=90, h=1, size=(90, 1), way='crop')
@example(w=90, h=1, size=(10, 10), way='pad')
def test_every_size_reaches_every_size(w, h, size, way):
    colour = (200, 30, 60)
    x = read_image(Image.new('RGB', (w, h), colour), size, way, background='black')
    assert x.shape == (*size, 3) and x.is_contiguous()
    ours = (x-torch.tensor(colour, dtype=torch.uint8)).abs().amax(-1) == 0
    assert ours.all() if way != 'pad' else ours.any()

@settings(max_examples=20, deadline=None)
@given(size=st.tuples(sides, sides), n=st.integers(1, 4), min_scale=st.floats(0.05, 1))
def test_crops_stay_inside_the_image(size, n, min_scale):
    y = RandomCropFlip(min_scale)(TensorImage(torch.full((n, 3, *size), 77, dtype=torch.uint8)), split_idx=0)
    assert y.shape == (n, 3, *size) and (y == 77).all()

# ---------------------------------------------------------------- names

@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1, max_size=20)
                      .filter(lambda s: not s.startswith('.')), min_size=4, max_size=4, unique_by=lambda s: s.casefold()))
def test_any_name_will_do(names, tmp_path_factory):
    root = tmp_path_factory.mktemp('names')
    a, b, c, d = names
    make_images(root, [f'{k}/{n}.png' for k in (a, b) for n in (c, d)], (16, 16))
    files = image_files(root)
    assert len(files) == 4
    dls = get_dls(root, size=16, bs=2, valid_pct=0.5, num_workers=0, cache='disk')
    assert sorted(dls.vocab) == sorted([a, b])
    assert len(dls.train.one_batch()[1]) == 2
    assert len(resizer_check(root, size=16, out=8, valid_pct=0.5, csv=root.parent/'check.csv')) == len(pd.read_csv(root.parent/'check.csv')) == 4

def test_a_name_that_is_no_text(tmp_path, capsys):
    root = make_images(tmp_path, [f'{c}/{i}.png' for c in ('a', 'b') for i in range(3)], (16, 16))
    try: os.rename(root/'a'/'0.png', os.fsencode(root/'a')+b'/\xff\xfe.png')
    except OSError: pytest.skip('this file system wants text')
    (root/'b'/os.fsdecode(b'\xfd.jpg')).write_text('no image')
    assert sum(len(d.dataset) for d in get_dls(root, size=16, bs=2, valid_pct=0.4, num_workers=0, cache='disk').loaders) == 6
    resizer_check(root, valid_pct=0.4, csv=tmp_path/'check.csv')
    assert capsys.readouterr().out.encode()   # can be printed

def test_hidden_files_and_loops(tmp_path):
    root = make_images(tmp_path/'set', ['train/a/1.png', 'train/a/.2.png', 'train/.trash/3.png', '__MACOSX/._4.png', 'train/b/5.PNG'])
    for name in ('.DS_Store', 'Thumbs.db', 'desktop.ini', 'notes.txt'): (root/'train'/'a'/name).write_text('x')
    (root/'train'/'a'/'up').symlink_to(root)
    (root/'train'/'b'/'self').symlink_to('.')
    (root/'train'/'c').symlink_to(tmp_path/'elsewhere')
    make_images(tmp_path/'elsewhere', ['6.png'])
    assert [f.relative_to(root).as_posix() for f in image_files(root)] == ['train/a/1.png', 'train/b/5.PNG', 'train/c/6.png']

def test_a_real_folder_wins_over_a_link_to_it(tmp_path):
    root = make_images(tmp_path, [f'{c}/1.png' for c in ('a', 'b', 'cat')])
    (root/'a'/'sib').symlink_to('../b')
    (root/'alias').symlink_to('cat')
    assert [f.parent.name for f in image_files(root)] == ['a', 'b', 'cat']

# ---------------------------------------------------------------- bad files in training

@pytest.fixture
def messy(tmp_path):
    "Two classes of ten images and one of each kind of bad file"
    root = make_images(tmp_path/'messy', [f'{s}/{c}/{i}.png' for s, n in (('train', 8), ('val', 2)) for c in ('cat', 'dog') for i in range(n)])
    (root/'train'/'cat'/'text.jpg').write_text('no image')
    (root/'train'/'dog'/'empty.png').touch()
    (root/'val'/'dog'/'gone.png').symlink_to(root/'nowhere.png')
    (root/'train'/'cat'/'cut.png').write_bytes((root/'train'/'cat'/'0.png').read_bytes()[:-1200])
    return root

def listing(root): return {f: (f.lstat().st_size, f.lstat().st_mtime_ns) for f in [root, *root.rglob('*')]}

def test_bad_files_stop_nothing_and_are_named(messy, shell, tmp_path):
    before = listing(messy)
    res = shell('resizer_train', '--data', messy, '--arch', 'resnet18', '--size', '64x96', '--out', 32, '--resize', 'crop', '--epochs', 1,
                '--bs', 4, '--workers', 2, '--cache', 'disk', '--name', 'run')
    assert res.returncode == 0, res.stderr
    assert 'note: 3 of 24 images cannot be read and are left out' in res.stdout
    for name in ('cat/text.jpg', 'dog/empty.png', 'dog/gone.png'): assert name in res.stdout
    left = pd.read_csv(tmp_path/'runs'/'run'/'left_out.csv')
    assert sorted(Path(f).name for f in left.file) == ['empty.png', 'gone.png', 'text.jpg'] and left.error.str.len().min() > 5
    assert listing(messy) == before

def test_a_class_is_split_over_what_can_be_read(tmp_path, capsys):
    root = make_images(tmp_path, [f'{c}/{i}.png' for c in ('a', 'b', 'c') for i in range(4)])
    for i in range(4):
        for bad in {0, 1, 2, 3} - {i, (i+1) % 4}: (root/'c'/f'{bad}.png').write_text('no image')
        for good in (i, (i+1) % 4): make_images(root, [f'c/{good}.png'])
        dls = get_dls(root, size=16, bs=2, valid_pct=0.3, num_workers=0)
        counts = [sum(f.parent.name == 'c' for f in d.items) for d in dls.loaders]
        assert counts == [1, 1] and '2 of 12 images' in capsys.readouterr().out

def test_images_beside_the_classes_are_passed_over(tmp_path, monkeypatch, capsys):
    root = make_images(tmp_path, ['stray.png', *[f'{c}/{i}.png' for c in 'ab' for i in range(4)]])
    monkeypatch.chdir(root)
    for where in ('.', root):
        dls = get_dls(where, size=16, bs=2, valid_pct=0.3, num_workers=0)
        assert list(dls.vocab) == ['a', 'b'] and '1 of 9 images are in no folder' in capsys.readouterr().out
    dls = get_dls('.', size=16, bs=2, valid_pct=0.3, num_workers=0)
    monkeypatch.chdir('/')
    assert len(dls.valid.one_batch()[0]) == 2

def test_images_at_another_depth_are_passed_over(messy, capsys):
    make_images(messy, ['train/cat/more/1.png', 'test/cat/2.png', 'valid/cat/3.png'])
    dls = get_dls(messy, size=16, bs=2, num_workers=0)
    assert '3 of 27 images are in no folder' in capsys.readouterr().out and list(dls.vocab) == ['cat', 'dog']
    resizer_check(messy)
    assert '3 in neither' in capsys.readouterr().out

def test_runs_do_not_go_into_the_data(messy, shell):
    before = listing(messy)
    res = shell('resizer_train', '--data', messy, '--arch', 'resnet18', '--size', 32, '--out', 16, '--runs', messy/'runs')
    assert res.returncode == 2 and 'would lie in the data' in res.stderr and len(res.stderr.splitlines()) == 1
    assert listing(messy) == before

def test_names_that_are_no_text_are_trained_on(messy, shell, tmp_path):
    try: os.rename(messy/'train'/'cat'/'0.png', os.fsencode(messy/'train'/'cat')+b'/\xff.png')
    except OSError: pytest.skip('this file system wants text')
    res = shell('resizer_train', '--data', messy, '--arch', 'resnet18', '--size', 64, '--out', 32, '--epochs', 1, '--bs', 4, '--workers', 0, '--cache', 'disk', '--name', 'run')
    assert res.returncode == 0, res.stderr
    assert (tmp_path/'runs'/'run'/'preds.npz').exists()

def test_the_first_ten_are_named_and_the_rest_counted(tmp_path, capsys):
    root = make_images(tmp_path, [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(3)])
    for i in range(13): (root/'cat'/f'bad{i:02}.png').touch()
    dls = get_dls(root, size=16, bs=2, valid_pct=0.3, num_workers=0)
    said = capsys.readouterr().out
    assert '13 of 19 images' in said and said.count('cat/bad') == 10 and 'and 3 more' in said
    assert len(dls.left_out) == 13

def test_check_command(messy, shell, tmp_path):
    before = listing(messy)
    res = shell('resizer_check', messy, '--size', 64, '--out', 32, '--csv', 'check.csv')
    assert res.returncode == 0, res.stderr
    for line in ('23 images of 2 classes', 'unreadable                       3', 'truncated                        1', '100% of the images are enlarged'):
        assert line in res.stdout.replace('24 images', '23 images'), res.stdout
    assert len(pd.read_csv(tmp_path/'check.csv')) == 24
    assert listing(messy) == before
    for args, code in [(('nowhere',), 1), ((messy, '--size', '0'), 2), ((messy, '--valid_pct', '2'), 2)]:
        res = shell('resizer_check', *args)
        assert res.returncode == code and 'Traceback' not in res.stderr and res.stderr

def test_check_counts_a_class_by_what_can_be_read(messy, capsys):
    for f in (messy/'train'/'cat').iterdir(): f.write_text('no image')
    resizer_check(messy)
    assert 'classes not in train             1  an error' in capsys.readouterr().out

def test_a_changed_file_is_looked_at_again(tmp_path):
    root = make_images(tmp_path, ['a/1.png', 'a/2.png'])
    files = image_files(root)
    old = check_images(files)
    draw_sample(5, 5, 50).save(files[0])
    new = check_images(files)
    assert old.pixels[1] == new.pixels[1] and old.pixels[0] != new.pixels[0] and new.height[0] == 50

# ---------------------------------------------------------------- splits

@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), pct=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_split_by_share_is_stratified_and_depends_on_names_only(counts, pct, seed):
    files = [Path(f'set/class {c}/{i}é.png') for c, n in enumerate(counts) for i in range(n)]
    mixed = [files[i] for i in np.random.RandomState(seed).permutation(len(files))]
    (train, valid), (train2, valid2) = [[{fs[i] for i in s} for s in split_files(fs, valid_pct=pct)] for fs in (files, mixed)]
    assert (train, valid) == (train2, valid2) and not train & valid and len(train | valid) == len(files)
    for c, n in enumerate(counts):
        got = Counter(f.parent.name for f in valid)[f'class {c}']
        assert 1 <= got < n and abs(got-n*pct) <= 1
