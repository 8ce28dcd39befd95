"Pictures of any learner, under any backend, that leave no trace; reports."
import io, json, re, subprocess, sys
import PIL.Image
import numpy as np, pandas as pd, pytest, torch
import matplotlib.pyplot as plt
from fastai.vision.all import ImageDataLoaders, PILImage, PILImageBW, Resize, nn, resnet18, set_seed
from conftest import make_images, repo
from resizer_fastai.data import UsageError, get_dls, get_path
from resizer_fastai.learner import resizer_learner
from resizer_fastai.show import Film, explore, picture, resized_views, section, write_report
from resizer_fastai.train import load_run, resizer_train, run_report

plain = dict(pretrained=False, lin_ftrs=[], ps=0., concat_pool=False, first_bn=False, init=None)

def small(size=32, out=16, **kwargs):
    set_seed(0)
    return resizer_learner(get_dls('sample', size=size, bs=10, limit=20, num_workers=0), resnet18, size=out, **plain | kwargs)

@pytest.fixture(scope='module')
def learn(): return small()

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

figures = {'resized': lambda l: l.show_resized(classes=list(l.dls.vocab)[:2]), 'spectrum': lambda l: l.plot_spectrum(per_class=1),
           'response': lambda l: l.plot_response(n=4), 'cam': lambda l: l.show_cam(items=[0]), 'top_losses': lambda l: l.interpret().plot_top_losses(3),
           'results': lambda l: l.interpret().show_results([1]), 'confusion': lambda l: l.interpret().plot_confusion_matrix()}

@pytest.mark.parametrize('name', figures)
def test_a_figure_comes_back_and_no_other_is_touched(learn, name):
    mine = plt.figure()
    fig = figures[name](learn)
    assert isinstance(fig, plt.Figure) and plt.fignum_exists(mine.number) and len(plt.get_fignums()) == 2

@pytest.mark.parametrize('backend', ['svg', 'pdf'])
@pytest.mark.parametrize('name', figures)
def test_any_backend(learn, name, backend, tmp_path):
    was = plt.get_backend()
    plt.switch_backend(backend)
    try: figures[name](learn).savefig(tmp_path/f'a.{backend}')
    finally: plt.switch_backend(was)
    assert (tmp_path/f'a.{backend}').stat().st_size > 5000

@pytest.mark.parametrize('name', figures)
def test_every_axis_that_shows_numbers_says_what_and_in_which_unit(learn, name):
    fig = figures[name](learn)
    fig.canvas.draw()
    named = bool(fig._supxlabel and fig._supylabel)
    for ax in fig.axes:
        if len(ax.get_yticklabels()) and any(o.get_text() and o.get_visible() for o in ax.get_yticklabels()): assert ax.get_ylabel() or ax.get_xlabel() or named, ax

def test_looking_changes_nothing():
    "Neither weights, nor running statistics, nor mode, nor what the next random draw is"
    l = small()
    l.model.train()
    before, state = {k: v.clone() for k, v in l.model.state_dict().items()}, torch.get_rng_state()
    l.show_resized(classes=['grain-27']), l.plot_spectrum(per_class=1), l.plot_response(n=3), l.show_cam(items=[0])
    assert all(torch.equal(v, before[k]) for k, v in l.model.state_dict().items())
    assert l.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in l.model.parameters())

def test_film_changes_no_training():
    losses = []
    for cbs in ([], [Film()]):
        l = small(cbs=cbs)
        set_seed(0)
        with l.no_bar(), l.no_logging(): l.fit(1, 1e-3)
        losses.append(l.recorder.values[-1])
    assert losses[0] == losses[1]

@pytest.mark.parametrize('scale', ['std', 'minmax', 'clip'])
def test_one_range_for_all_rows(learn, scale):
    "Every picture of the resizer's column is drawn with the range in its title"
    fig = learn.show_resized(scale=scale, classes=['grain-27', 'grain-45'])
    axs = np.array([ax for ax in fig.axes if ax.get_label() != '<colorbar>']).reshape(2, 6)
    lo, hi = map(float, re.findall(r'(-?[\d.]+) to (-?[\d.]+)', axs[0, 4].get_title())[-1])
    places = [next(i for i, f in enumerate(learn.dls.valid_ds.items) if f.parent.name == c) for c in ('grain-27', 'grain-45')]
    batch = learn.model.read_batch([learn.dls.valid_ds.items[i] for i in places])
    y = resized_views(learn.model, batch)['resized']
    for ax, im in zip(axs[:, 4], y):
        drawn = torch.tensor(np.array(ax.images[0].get_array())).permute(2, 0, 1)
        torch.testing.assert_close(drawn, ((im-lo)/(hi-lo)).clamp(0, 1), atol=0.02, rtol=0)

def test_files_pictures_and_arrays_are_the_same_items(learn):
    f = learn.dls.valid_ds.items[0]
    views = [resized_views(learn.model, learn.model.read_batch([o])) for o in (f, str(f), PILImage.create(f), np.array(PILImage.create(f)))]
    for v in views[1:]: torch.testing.assert_close(v['resized'], views[0]['resized'])
    assert learn.show_resized(items=[f]).axes[0].get_ylabel() == f.name
    assert learn.show_resized(items=f, controls=('antialias',)).axes[1].get_title().startswith('antialias')

@pytest.mark.parametrize('size,out', [((40, 24), (10, 12)), (8, 4), (5, 7), (16, 16)])
def test_any_size(size, out):
    l = small(size, out)
    for f in figures.values(): f(l)

def test_grey_images(tmp_path):
    make_images(tmp_path, [f'{c}/{i}.png' for c in 'ab' for i in range(6)])
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0, img_cls=PILImageBW)
    l = resizer_learner(dls, resnet18, size=16, n_in=1, **plain)
    for f in ('resized', 'spectrum', 'response', 'cam', 'top_losses'): figures[f](l)

def test_several_labels_an_image(tmp_path):
    make_images(tmp_path, [f'{i}.png' for i in range(8)])
    df = pd.DataFrame(dict(name=[f'{i}.png' for i in range(8)], labels=['x', 'x y', 'y', 'x']*2))
    dls = ImageDataLoaders.from_df(df, tmp_path, fn_col='name', label_col='labels', label_delim=' ', valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0)
    l = resizer_learner(dls, resnet18, size=16, **plain)
    with pytest.raises(ValueError, match='pass items'): l.show_resized()
    assert set(l.show_resized(items=[0]).axes[0].get_ylabel().split(';')) <= {'x', 'y'}

def test_fewer_or_more_channels_have_no_picture():
    l = small(resizer_args=dict(out_channels=6))
    with pytest.raises(ValueError, match='from 3 to 6 channels has no image'): l.show_resized()

def test_a_body_without_maps_has_no_cam():
    l = small(64, 32)
    l.model.body, l.model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 10)
    with pytest.raises(ValueError, match='needs a body that puts out maps'): l.show_cam(items=[0])

def test_a_class_may_be_called_anything(tmp_path):
    "Dollars are no formula, and mark-up is text"
    names = ['$cash$', 'a_$^{$', '<b>&amp;']
    make_images(tmp_path/'data', [f'{c}/{i}.png' for c in names for i in range(8)])
    learn = resizer_train(data=tmp_path/'data', valid_pct=0.5, arch='resnet18', size=32, out=16, epochs=1, bs=4, workers=0, runs=tmp_path)
    assert [o.get_ylabel() for o in learn.show_resized().axes[:18:6]] == sorted(names)
    html = (learn.path/'report.html').read_text()
    assert '&lt;b&gt;&amp;amp;' in html and '<b>&' not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and '<script' not in html and len(html) < 5e6
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', html)) and html.count('<img') >= 7

def test_a_report_is_made_of_what_lies_in_the_folder(tmp_path):
    learn = resizer_train(data='sample', limit=20, arch='resnet18', size=32, out=16, epochs=1, bs=10, workers=0, runs=tmp_path)
    html = (learn.path/'report.html').read_text()
    run = json.loads((learn.path/'run.json').read_text())
    for o in (run['command'], run['data']['fingerprint'], run['versions']['torch'], f'{run["parameters"]["resizer"]:,}', f'{100*run["metrics"]["accuracy"]:.2f} %'): assert o in html
    (learn.path/'report.html').unlink()
    assert run_report(learn.path).read_text() == html
    with pytest.raises(UsageError, match='no run of this project'): run_report(tmp_path)

def test_a_run_that_is_taken_up_again_sees_what_it_saw(tmp_path):
    "Predictions are the run's, with the statistics that stand beside its model, and all pictures can be drawn"
    path = resizer_train(data='sample', limit=20, arch='resnet18', resizer='bilinear', size=32, out=16, epochs=1, bs=10, workers=0, runs=tmp_path).path
    config = json.loads((path/'model'/'config.json').read_text())
    (path/'model'/'config.json').write_text(json.dumps(config | dict(mean=[0.5]*3, std=[0.25]*3)))
    learn = load_run(path)
    x, y = learn.dls.valid.one_batch()
    names = np.load(path/'preds.npz')['names'][:len(x)]
    torch.testing.assert_close(x.as_subclass(torch.Tensor), learn.model.read_batch([get_path('sample')/n for n in names]))
    with learn.no_bar(): preds, targs = learn.get_preds()
    torch.testing.assert_close(preds[:len(x)], learn.model.predict([get_path('sample')/n for n in names])[2])
    assert targs.tolist() == np.load(path/'preds.npz')['targets'].tolist()
    for f in figures.values(): f(learn)

def test_a_large_report_is_made_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    PILImage.create(noise).save(tmp_path/'a.png')
    file = write_report(tmp_path/'r.html', 'big', [], [], [section('one', pictures=[picture(tmp_path/'a.png', 'noise')]*3)])
    assert 1e6 < file.stat().st_size < 5e6

def test_explore_turns_pages(learn):
    pytest.importorskip('ipywidgets')
    controls, page = explore(learn).children
    which, nth, view, share = controls.children
    seen = [page.value]
    for change in (lambda: setattr(nth, 'value', 1), lambda: setattr(view, 'value', 'slider'), lambda: setattr(share, 'value', 0.25), lambda: setattr(which, 'value', 'grain-45')):
        change()
        seen.append(page.value)
    assert len(set(seen)) == 5 and all(PIL.Image.open(io.BytesIO(o)).size[0] > 900 for o in seen)
    assert (nth.value, nth.max, share.layout.display) == (0, 1, None)
    view.value = 'side by side'
    assert share.layout.display == 'none'

def test_missing_ipywidgets_is_one_sentence(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(UsageError, match=r'resizer_fastai\[explore\]'): explore(learn)

def test_the_template_is_installed(tmp_path):
    pytest.importorskip('setuptools')
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', tmp_path], cwd=repo, check=True, capture_output=True)
    assert {o.relative_to(tmp_path) for o in tmp_path.rglob('*.html')} == {o.relative_to(repo) for o in (repo/'resizer_fastai').rglob('*.html')} != set()
