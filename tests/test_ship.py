"Predictions for files, exported programs, and what goes to the Hub."
import io, json, os, re, shutil, subprocess, sys, threading
from importlib.util import find_spec
import numpy as np
import pytest
from conftest import make_images, needs_timm
import torch
import pandas as pd
from fastai.vision.all import Image, Path, first, get_image_files, nn
from huggingface_hub import HfApi
from resizer_fastai.data import ReadImage
from resizer_fastai.learner import ResizerClassifier, plain_head
from resizer_fastai.ship import (Shipped, explain_image, export_onnx, export_pt2, model_card, model_facts, predict_files, push_to_hub, read_ahead,
                                 shipped_model, trace)
from resizer_fastai.train import train_options

needs_onnx = pytest.mark.skipif(not (find_spec('onnxscript') and find_spec('onnxruntime')), reason='no onnxscript and onnxruntime')

def small(arch='squeezenet1_1', n=3, resizer='learned', **kwargs):
    torch.manual_seed(0)
    return ResizerClassifier(arch, n, resizer, 32, read=ReadImage(64, **kwargs.pop('read', {})), mean=[.4, .5, .6], std=[.2, .3, .2],
                             **dict(vocab=list('abc'[:n])) | kwargs).eval()

@pytest.fixture
def saved(tmp_path):
    small().save_pretrained(tmp_path/'model')
    return tmp_path/'model'

# Predictions

def test_broken_file_is_a_row_and_stops_nothing(command, saved, tmp_path):
    make_images(tmp_path/'p', ['x/1.png', 'x/2.png'])
    (tmp_path/'p'/'no.png').write_text('no image')
    status, out, err = command('resizer_predict', saved, 'p/x/1.png', 'p/no.png', 'gone.png', 'p/x/2.png', '--csv', 'a.csv', '--json', 'a.json')
    assert status == 1 and '2 of 4 images could not be read' in err and 'Traceback' not in err
    df, rows = pd.read_csv('a.csv'), json.loads(Path('a.json').read_text())
    assert list(df.file) == [o['file'] for o in rows] == ['p/x/1.png', 'p/no.png', 'gone.png', 'p/x/2.png']
    assert list(df.error.isna()) == [o['error'] is None for o in rows] == [True, False, False, True]
    assert list(df.class_1.isna()) == [False, True, True, False]

def test_pipes_and_devices_are_not_read(command, saved, tmp_path):
    make_images(tmp_path/'p', ['1.png', 'folder.jpg/2.png'])
    os.mkfifo(tmp_path/'p'/'pipe.png')
    (tmp_path/'p'/'zero.png').symlink_to('/dev/zero')
    status, out, err = command('resizer_predict', saved, 'p')
    assert status == 0 and len(out.splitlines()) == 2 and 'note: pipes and devices are skipped: pipe.png, zero.png' in err
    status, out, err = command('resizer_predict', saved, 'p/pipe.png', 'p/folder.jpg/2.png', 'p/zero.png')
    assert status == 1 and err.count('is no regular file') == 2

def test_names_from_folder_pattern_and_standard_input(command, saved, tmp_path, monkeypatch):
    make_images(tmp_path/'p', ['1.png', '2.png', '3.png'])
    def named(*args): return [o.split('\t')[0] for o in command('resizer_predict', saved, *args)[1].splitlines()]
    files = [str(tmp_path/'p'/f'{i}.png') for i in (1, 2, 3)]
    assert named(tmp_path/'p') == named(tmp_path/'p'/'*.png') == named(*files[:2], '--topk', 2, files[2]) == files
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(files)))
    assert named('-', '--bs', 2) == files

@pytest.mark.parametrize('activation,columns', [('softmax', ['class_1', 'probability_1', 'class_2', 'probability_2']),
    ('sigmoid', ['labels', 'class_1', 'probability_1', 'class_2', 'probability_2']), ('none', ['value_0', 'value_1', 'value_2'])])
def test_answer_says_what_the_outputs_mean(tmp_path, activation, columns):
    make_images(tmp_path, ['1.png', '2.png'])
    model = small(activation=activation, vocab=None if activation == 'none' else list('abc'))
    df = predict_files(model, get_image_files(tmp_path).sorted(), topk=2)
    outputs = model.predict(get_image_files(tmp_path).sorted())[2]
    assert list(df) == ['file', *columns, 'error']
    if activation == 'none': assert np.allclose(df[columns], outputs, atol=1e-4)
    else: assert np.allclose(df.probability_1, outputs.max(1).values, atol=1e-4) and list(df.class_1) == ['abc'[i] for i in outputs.argmax(1)]
    if activation == 'sigmoid': assert list(df.labels) == [';'.join(c for c, p in zip('abc', o) if p > 0.5) for o in outputs]

def test_model_that_cannot_read_files_says_so(command, tmp_path):
    ResizerClassifier('squeezenet1_1', 3, 'bilinear', 32, input_size=64).save_pretrained(tmp_path/'m')
    make_images(tmp_path, ['1.png'])
    for args in (['resizer_predict', 'm', '1.png'], ['resizer_export', 'm', '--onnx', 'm.onnx', '--check', '.']):
        status, _, err = command(*args)
        assert status == 2 and 'does not know how its images are read' in err

def test_images_are_read_before_they_are_asked_for():
    "But not all of them"
    started = [threading.Event() for _ in range(20)]
    def read(i):
        started[i].set()
        return torch.zeros(3, 8, 8)
    images = read_ahead(range(20), read, num_workers=2, ahead=4)
    assert next(images)[0] == 0
    for o in started[:5]: assert o.wait(10)
    assert not any(o.is_set() for o in started[5:])
    assert [i for i, _ in images] == list(range(1, 20))

def test_file_that_is_named_twice_is_answered_twice(tmp_path):
    files = [make_images(tmp_path, ['1.png', '2.png'])/o for o in ('1.png', '2.png', '1.png')]
    df = predict_files(small(), files, bs=3)
    assert df.probability_1[0] == df.probability_1[2] != df.probability_1[1]

def test_file_that_is_there_is_no_pattern(command, saved, tmp_path):
    make_images(tmp_path, ['photo1.png', 'photo[1].png', '--x-y.png'])
    assert command('resizer_predict', saved, 'photo[1].png')[1].split('\t')[0] == 'photo[1].png'
    assert command('resizer_predict', saved, '--', '--x-y.png')[1].split('\t')[0] == '--x-y.png'

def test_empty_folder_stops_nothing_and_notes_are_no_answers(command, saved, tmp_path):
    make_images(tmp_path/'p', ['a/1.png'])
    (tmp_path/'p'/'a'/'notes.doc').write_text('')
    (tmp_path/'empty').mkdir()
    status, out, err = command('resizer_predict', saved, 'p', 'empty')
    assert status == 1 and len(out.splitlines()) == 1 and 'notes' not in out and '1 files are skipped' in err and 'empty' in err

@pytest.mark.parametrize('args,says', [
    (['resizer_predict', '--csv', 'a', '--json', 'a'], 'a would be written twice'), (['resizer_predict', '--csv', 'p'], 'p cannot be written'),
    (['resizer_predict', '--topk', 0], 'topk and bs must be 1 or more'), (['resizer_predict', '--bs', 0], 'topk and bs must be 1 or more'),
    (['resizer_predict', '--save_resized', 'p/seen'], 'p/seen is inside p'), (['resizer_export', '--onnx', 'm'], 'm must end in .onnx'),
    (['resizer_export', '--onnx', 'm.onnx', '--resizer', 'm.onnx'], 'm.onnx would be written twice'),
    (['resizer_export', '--onnx', 'mine.onnx'], 'mine.py is there already')], ids=lambda o: ' '.join(map(str, o)) if isinstance(o, list) else '')
def test_nothing_is_computed_for_an_output_that_cannot_be_written(command, saved, tmp_path, args, says):
    make_images(tmp_path/'p', ['1.png'])
    (tmp_path/'mine.py').write_text('print(1)')
    name, *rest = args
    status, _, err = command(name, saved, *(['p'] if name == 'resizer_predict' else []), *rest)
    assert status in (1, 2) and says in err
    assert (tmp_path/'mine.py').read_text() == 'print(1)' and not (tmp_path/'mine.onnx').exists()

def test_names_of_any_bytes_are_written(command, saved, tmp_path):
    import os
    name = os.fsdecode(b'caf\xe9.png')
    make_images(tmp_path, ['1.png'])
    os.rename(tmp_path/'1.png', tmp_path/name)
    assert command('resizer_predict', saved, name, '--csv', 'new/a.csv', '--json', 'new/a.json')[0] == 0
    assert json.loads(Path('new/a.json').read_text())[0]['file'] == name
    assert pd.read_csv('new/a.csv', encoding_errors='surrogateescape').file[0] == name

def test_saved_views_are_what_the_body_sees(tmp_path):
    make_images(tmp_path/'p', ['a/1.png', 'b/1.png'])
    model, files = small(), get_image_files(tmp_path/'p').sorted()
    with torch.no_grad(): model.resizer.out.weight *= 30
    predict_files(model, files, save_resized=tmp_path/'seen')
    with torch.no_grad(): seen = model.resizer(model.read_batch(files))*model.std+model.mean
    assert seen.min() < 0 and seen.max() > 1   # so that the scale matters
    for f, y in zip(files, seen):
        im = Image.open((tmp_path/'seen'/f.relative_to(tmp_path/'p')).with_suffix('.png.png'))
        lo, hi = map(float, re.findall(r'-?\d+\.\d+', im.text['scaling']))
        got = lo+(hi-lo)*np.asarray(im).transpose(2, 0, 1)/255
        assert np.abs(got-y.clamp(lo, hi).numpy()).max() <= 0.51*(hi-lo)/255+1e-3

# Exported programs

@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize('resizer', ['learned', 'muller', 'antialias', 'blurred'])
def test_onnx_takes_any_number_and_size(tmp_path, resizer):
    import onnxruntime
    model = small(resizer=resizer)
    export_onnx(shipped_model(model), tmp_path/'m.onnx', model_facts(model), torch.rand(3, 3, 64, 64))
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    x = torch.rand(5, 3, 80, 96)
    assert np.abs(session.run(None, dict(images=x.numpy()))[0]-shipped_model(model)(x).detach().numpy()).max() < 1e-4

@pytest.mark.slow
@needs_onnx
@needs_timm
def test_body_of_one_size_is_exported_for_that_size(tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    model = ResizerClassifier('timm/vit_tiny_patch16_224', 3, 'none', input_size=224).eval()
    export_onnx(shipped_model(model), tmp_path/'m.onnx', model_facts(model), torch.rand(2, 3, 224, 224))
    assert onnxruntime.InferenceSession(tmp_path/'m.onnx').get_inputs()[0].shape == ['batch', 3, 224, 224]

@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize('resize', ['squish', 'crop', 'pad'])
def test_script_beside_the_file_gives_the_same_answers(command, tmp_path, resize):
    "It needs onnxruntime, NumPy and Pillow only; transparent and turned images are read alike"
    small(read=dict(resize=resize)).save_pretrained(tmp_path/'model')
    files = [make_images(tmp_path, ['a.png', 'b.jpg', 'c.jpg'], (50, 90))/o for o in ('a.png', 'b.jpg', 'c.jpg', 'd.png', 'e.tif')]
    files[2].write_bytes(files[2].read_bytes()[:-200])
    grey = np.linspace(0, 65535, 90*50).reshape(90, 50)
    Image.fromarray(grey.astype(np.uint16)).save(files[3]), Image.fromarray((grey/65535).astype(np.float32)).save(files[4])
    with Image.open(files[0]) as im: im.putalpha(Image.linear_gradient('L').resize(im.size)); im.save(files[0])
    turned = Image.Exif()
    turned[274] = 6
    with Image.open(files[1]) as im: im.save(files[1], exif=turned, quality=95)
    status, out, err = command('resizer_export', 'model', '--onnx', 'm.onnx', '--check', '.')
    assert status == 0 and '100% with the same largest output' in out, err
    code = '''
import sys, runpy
sys.argv = sys.argv[1:]
try: runpy.run_path(sys.argv[0])
finally: assert not {'torch', 'fastai', 'resizer_fastai'} & set(sys.modules)'''
    said = subprocess.run([sys.executable, '-c', code, tmp_path/'m.py', 'gone.png', *files], capture_output=True, text=True)
    assert said.returncode == 1 and 'Traceback' not in said.stderr and 'gone.png' in said.stderr
    rows = [o.split('\t') for o in said.stdout.splitlines()]
    df = predict_files(ResizerClassifier.from_pretrained('model'), files)
    assert [o[1] for o in rows] == list(df.class_1) and np.allclose([float(o[2]) for o in rows], df.probability_1, atol=2e-4)

@pytest.mark.slow
@needs_onnx
def test_exports_agree_on_photographs(photos, tmp_path):
    "Probabilities to 1e-4, and the same class, on 32 photographs"
    torch.manual_seed(0)
    model = ResizerClassifier('resnet18', 10, 'learned', 112, read=ReadImage(224), mean=[.5]*3, std=[.25]*3, **plain_head).eval()
    files = get_image_files(photos/'val').sorted()
    images = torch.stack([torch.Tensor(model.read(f)) for f in files[::len(files)//32][:32]])/255
    facts = model_facts(model)
    for export, file in ((export_onnx, 'm.onnx'), (export_pt2, 'm.pt2')):
        said = export(shipped_model(model), tmp_path/file, facts, images)
        assert 'on 32 images, 100% with the same largest output' in said and float(said.split()[4]) < 1e-4

@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize('activation', ['sigmoid', 'none'])
def test_script_says_what_the_command_says(command, tmp_path, activation):
    small(activation=activation, vocab=None if activation == 'none' else list('abc')).save_pretrained(tmp_path/'model')
    make_images(tmp_path, ['a.png'])
    assert command('resizer_export', 'model', '--onnx', 'm.onnx')[0] == 0
    said = subprocess.run([sys.executable, 'm.py', 'a.png'], capture_output=True, text=True).stdout.split('\t')
    rows = command('resizer_predict', 'model', 'a.png')[1].split('\t')
    number = lambda o: float(o) if re.fullmatch(r'-?[\d.]+\s*', o) else o
    assert len(said) == len(rows) and all(a == b or abs(a-b) < 2e-4 for a, b in zip(map(number, said), map(number, rows)))

def test_wrong_program_is_noticed(tmp_path):
    from resizer_fastai.ship import check_same
    module, x = shipped_model(small()), torch.rand(3, 3, 64, 64)
    right = lambda x: module(torch.from_numpy(x)).detach().numpy()
    assert '100% with the same largest output' in check_same(right, module, x)
    for wrong in (lambda x: right(x)+2e-4, lambda x: right(x[::-1].copy()), lambda x: right(x)*np.nan, lambda x: right(x)*(np.nan if len(x) > 1 else 1)):
        with pytest.raises(ValueError, match='does not agree'): check_same(wrong, module, x)

def test_wrong_export_leaves_no_file(command, saved, monkeypatch):
    monkeypatch.setattr('resizer_fastai.ship.trace', lambda module, size, n_in: trace(Shipped(small(n=3), nn.Sequential(module, nn.Tanh())), size, n_in))
    status, _, err = command('resizer_export', saved, '--pt2', 'm.pt2')
    assert status == 2 and 'does not agree' in err and not Path('m.pt2').exists()

def test_traced_resizer_takes_its_facts_along(tmp_path):
    model = small()
    facts, files = model_facts(model), {'facts.json': ''}
    export_pt2(Shipped(model, model.resizer), tmp_path/'r.pt2', facts, torch.rand(2, 3, 64, 64))
    program = torch.export.load(tmp_path/'r.pt2', extra_files=files)
    assert json.loads(files['facts.json']) == json.loads(json.dumps(facts))
    assert program.module()(torch.rand(1, 3, 100, 90)).shape == (1, 3, 32, 32)

# Hub

def hostile_run(path):
    "A folder that looks like a run, with names that mean something in Markdown, HTML and YAML"
    bad = '<script>alert(1)</script> | `x` [a](b)\n# big'
    make_images(path, ['images/resized.png'])
    small(vocab=[bad, 'b', 'c']).save_pretrained(path/'model')
    run = dict(args=dict(train_options(data='sample'), data=bad), metrics=dict(accuracy=0.5, valid_loss=1., seconds=1.), command='resizer_train --name ```x',
               device=bad, precision='fp32', versions=dict(torch='2'), parameters={},
               data=dict(train=1, valid=2, left_out=0, classes=[bad], short_side=64, enlarged=0., pixels=''))
    (path/'run.json').write_text(json.dumps(run))
    return path

def test_model_card_is_whole_and_escaped(tmp_path):
    card = model_card(hostile_run(tmp_path), 'me/wo"of', license='apache-2.0')
    head, body = card.split('---\n')[1:]
    assert 'license: "apache-2.0"' in head and '50.00 % of 2 validation images' in body
    assert 'images of 64x64 pixels' in body and 'Talebi and Milanfar' in body and 'to 32x32 pixels' in body
    assert '<script>' not in card and '\n# big' not in card and card.count('```') == 4
    assert r'\<script\>' in body and 'None' not in body and 'Information Needed' not in body

@pytest.mark.parametrize('kwargs', [dict(resizer='blurred'), dict(activation='none', vocab=None), dict(read=None)])
def test_model_card_says_what_holds_only(tmp_path, kwargs):
    model = small(**{k: v for k, v in kwargs.items() if k != 'read'})
    if 'read' in kwargs: model.read = None
    model.save_pretrained(tmp_path)
    card = model_card(tmp_path, 'me/woof')
    assert ('Talebi and Milanfar' in card) == ('resizer' not in kwargs)
    assert ('pipeline_tag' in card) == ('activation' not in kwargs)
    assert ("predict('photo.jpg')" in card) == ('read' not in kwargs)

def test_push_and_come_back(tmp_path, monkeypatch):
    "All but the network"
    created = []
    monkeypatch.setattr(HfApi, 'create_repo', lambda self, repo, **kwargs: created.append((repo, kwargs)))
    monkeypatch.setattr(HfApi, 'upload_folder', lambda self, repo_id, folder_path, **kwargs: shutil.copytree(folder_path, tmp_path/'hub'))
    path = hostile_run(tmp_path/'run')
    push_to_hub(path, 'me/woof', private=True)
    assert created == [('me/woof', dict(private=True, exist_ok=True))]
    assert sorted(o.name for o in (tmp_path/'hub').iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'resized.jpg']
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ResizerClassifier.from_pretrained(tmp_path/'hub').predict(x)[2], ResizerClassifier.from_pretrained(path/'model').predict(x)[2])

# Demo

@pytest.mark.parametrize('resizer', ['learned', 'none'])
def test_explanation_of_an_image(tmp_path, resizer):
    file = make_images(tmp_path, ['1.png'])/'1.png'
    model = small(resizer=resizer)
    answers, *pictures = explain_image(model, file)
    names, _, outputs = model.predict(file)
    assert first(answers) == names[0] and np.allclose(sorted(answers.values()), sorted(outputs[0].tolist()))
    assert all(o.dtype == np.uint8 and o.shape[2] == 3 for o in pictures)
    assert pictures[1].reshape(-1, 3).std(0).any() == (resizer == 'learned')   # `none` differs nowhere
    with pytest.raises(OSError): explain_image(model, tmp_path/'gone.png')
