"Pictures of any learner, under any backend, that leave no trace; reports."
import base64, io, json, os, re, subprocess, sys
import PIL.Image
import numpy as np, pandas as pd, pytest, torch
import matplotlib.pyplot as plt
from fastai.vision.all import Callback, ImageDataLoaders, PILImage, PILImageBW, Resize, load_learner, nn, resnet18, set_seed
from conftest import make_images, repo
from resizer_fastai.data import UsageError, get_dls, get_path
from resizer_fastai.learner import EMACallback, Frozen, resizer_learner
from resizer_fastai.resizer import make_resizer
from resizer_fastai.show import Film, _explored, class_spectra, explore, grating_gain, picture, resized_views, section, value_range, write_report, zone_plate
from resizer_fastai.train import load_run, plot_curves, resizer_train, run_report

plain = dict(pretrained=False, lin_ftrs=[], ps=0., concat_pool=False, first_bn=False, init=None)

def small(size=32, out=16, **kwargs):
    set_seed(0)
    return resizer_learner(get_dls('sample', size=size, bs=10, limit=20, num_workers=0), resnet18, size=out, **plain | kwargs)

@pytest.fixture(scope='module')
def learn(): return small()

@pytest.fixture(autouse=True)
def closed():
    plt.close('all')   # what other tests have left open
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

@pytest.mark.parametrize('name,labels', [
    ('resized', ['difference, 1 = black to white']), ('spectrum', ['frequency, cycles per pixel of the input', 'power spectral density\n(black to white)² px²']),
    ('response', ['frequency of the grating, cycles per pixel of the input', 'gain']), ('cam', ['Grad-CAM, share of the largest']), ('confusion', ['Predicted', 'Actual'])])
def test_axes_say_what_they_show_and_in_which_unit(learn, name, labels):
    fig = figures[name](learn)
    said = [o for ax in fig.axes for o in (ax.get_xlabel(), ax.get_ylabel())] + [o.get_text() for o in (fig._supxlabel, fig._supylabel) if o]
    assert set(labels) <= set(said)

def test_looking_changes_nothing():
    "Neither weights, nor running statistics, nor mode, nor what the next random draw is"
    l = small()
    l.model.train()
    before, state = {k: v.clone() for k, v in l.model.state_dict().items()}, torch.get_rng_state()
    l.show_resized(classes=['grain-27']), l.plot_spectrum(per_class=1), l.plot_response(n=3), l.show_cam(items=[0])
    assert all(torch.equal(v, before[k]) for k, v in l.model.state_dict().items())
    assert l.model.training and torch.equal(torch.get_rng_state(), state)
    l.model.body.eval()
    l.show_resized(items=[0]), l.show_cam(items=[0]), l.model.predict(l.dls.valid_ds.items[0])
    assert l.model.resizer.training and not l.model.body.training
    assert all(p.grad is None for p in l.model.parameters())

def test_film_changes_no_training():
    losses = []
    for cbs in ([], [Film()]):
        l = small(cbs=[Frozen('resizer'), *cbs])
        before = {k: v.clone() for k, v in l.resizer.state_dict().items()}
        set_seed(0)
        with l.no_bar(), l.no_logging(): l.fit(1, 1e-3)
        losses.append(l.recorder.values[-1])
        assert all(torch.equal(v, before[k]) for k, v in l.resizer.state_dict().items())
    assert losses[0] == losses[1]

def fit(l, *args):
    with l.no_bar(), l.no_logging(): l.fit(*args)

def test_film_shows_what_is_validated():
    "The average of `EMACallback`, and the model inside a wrapper"
    l = small(cbs=[Film(n=1), EMACallback(0.9)])
    fit(l, 2, 1e-2)
    last = resized_views(l.model, l.film.batch, ())['resized']
    torch.testing.assert_close(l.film.frames[-1].float(), last, atol=0.01, rtol=0.01)
    l = small(cbs=Film(n=1))
    l.create_opt()
    l.model = nn.DataParallel(l.model)   # on the CPU it only passes the batch on
    fit(l, 1, 1e-3)
    assert len(l.film.frames) == 2

def test_film_of_what_happens_in_between(tmp_path):
    "An interrupted fit and validation after it, a resizer of another size, export, and labels that are no classes"
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    l = small(cbs=[Film(n=1), Stop()])
    with pytest.raises(KeyboardInterrupt): fit(l, 2, 1e-3)
    l.remove_cb(Stop)
    with l.no_bar(): l.validate()
    assert len(l.film.frames) == 2
    l.resizer = make_resizer('learned', 12)
    fit(l, 1, 1e-3)
    assert {f.shape[-1] for f in l.film.frames} == {12}
    l.plot_film(n=1)
    assert len(l.film.frames) == 2   # before and after
    l.resizer = 'muller'
    fit(l, 1, 1e-3)
    fit(l, 1, 1e-3)
    assert len(l.film.frames) == 3
    l.path = tmp_path
    l.export('e.pkl')
    assert load_learner(tmp_path/'e.pkl').film.frames == []

def test_difference_and_order(learn):
    "Signed, learned minus the first control, averaged over channels"
    fig = learn.show_resized(items=[0, 3], controls=('antialias', 'bilinear'))
    views = resized_views(learn.model, learn.model.read_batch([learn.dls.valid_ds.items[i] for i in (0, 3)]))
    axs = np.array([ax for ax in fig.axes if ax.get_label() != '<colorbar>']).reshape(2, 5)
    assert [ax.get_title().split(',')[0] for ax in axs[0]] == ['input', 'antialias', 'bilinear', 'learned', 'learned - antialias']
    for row, y, b in zip(axs, views['resized'], views['antialias']): np.testing.assert_allclose(row[-1].images[0].get_array(), (y-b).mean(0), atol=1e-5)

def test_ranges():
    y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert value_range(y, 'std')[:2] == pytest.approx(((y.mean()-2*y.std()).item(), (y.mean()+2*y.std()).item()))
    assert value_range(y, 'minmax')[:2] == (y.min().item(), y.max().item()) and value_range(y, 'clip')[:2] == (0, 1)

def test_spectra_of_images_that_are_not_square():
    "Up to the limit of the coarser side, in cycles per pixel of the input; the line and the colours in the figure agree"
    l = small((40, 24), (10, 12))
    for f, p in class_spectra(l, 1)['grain-27'].values(): assert len(f) == len(p) and p.isfinite().all()
    assert class_spectra(l, 1)['grain-27']['resized'][0][-1].item() == pytest.approx(0.5*10/40)
    fig = l.plot_spectrum(per_class=1, classes=['grain-27'])
    *lines, = fig.axes[0].lines
    assert lines[0].get_xdata()[0] == pytest.approx(0.125) and lines[0].get_linestyle() == '--'
    curves = class_spectra(l, 1, ['grain-27'])['grain-27']
    shown = {t.get_text(): h for t, h in zip(fig.legends[0].get_texts(), fig.legends[0].legend_handles)}
    for name, line, (f, p) in zip(('input', 'bilinear', 'learned'), lines[1:], curves.values()):
        np.testing.assert_allclose(line.get_ydata(), p)
        assert shown[name].get_color() == line.get_color()

def test_response_of_known_filters():
    "MULLER with its published numbers lifts what bilinear passes on and stops the rest; the resizer sees normalised images"
    l = small(64, 32)
    gain = grating_gain(l.model, 32).set_index('frequency')
    assert 2 < gain.muller[0.1:0.2].max() < 2.6 and gain.muller[0.38:].max() < 0.2 < gain.bilinear[0.38:0.4].min()
    l.model.resizer = nn.Sequential(make_resizer('bilinear', 32), Doubled())
    again = grating_gain(l.model, 32).set_index('frequency')
    np.testing.assert_allclose(again.resized, 2*again.bilinear, rtol=1e-3, atol=1e-5)
    fig = l.plot_response(n=4)
    assert fig.axes[-1].lines[0].get_xdata()[0] == 0.25
    plate = zone_plate((64, 64))
    y = l.model.resizer((plate.expand(1, 3, 64, 64)-l.model.mean)/l.model.std)*l.model.std+l.model.mean
    np.testing.assert_allclose(fig.axes[4].images[0].get_array(), y[0].clamp(0, 1).permute(1, 2, 0), atol=1e-5)

class Doubled(nn.Module):
    "Twice the contrast about the mean that images are normalised with"
    def forward(self, x): return 2*x

def test_cam_lies_on_the_image(learn):
    fig = learn.show_cam(items=[0])
    for ax, (h, w) in zip(fig.axes[1:3], ((32, 32), (16, 16))):
        under, cam = ax.images
        assert list(cam.get_extent()) == [-0.5, w-0.5, h-0.5, -0.5] == list(under.get_extent())
    assert fig.axes[1].get_xlabel().split(', ')[0] in learn.dls.vocab

def test_training_images_are_predicted_as_they_are_shown():
    "And not as random crops of theirs, which nobody sees"
    set_seed(0)
    l = resizer_learner(get_dls('sample', size=32, bs=10, limit=20, min_scale=0.1, num_workers=0), resnet18, size=16, **plain)
    interp = l.interpret(0)
    torch.testing.assert_close(interp.preds, l.model.predict(list(interp.dl.items))[2], atol=1e-3, rtol=0)
    assert [l.dls.vocab[i] for i in interp.targs] == [f.parent.name for f in interp.dl.items] and set(interp.dl.items) == set(l.dls.train_ds.items)

def test_top_losses_show_their_own_images(learn):
    "In the order of the losses, with prediction, truth, loss and probability, coloured where wrong"
    interp = learn.interpret()
    fig = interp.plot_top_losses(3)
    losses, idxs = interp.top_losses(3)
    for ax, loss, i in zip(fig.axes[:6:2], losses, idxs):
        drawn = torch.tensor(np.array(ax.images[0].get_array())).permute(2, 0, 1)
        torch.testing.assert_close(drawn, resized_views(learn.model, learn.model.read_batch([learn.dls.valid_ds.items[i]]))['input'][0].clamp(0, 1), atol=1e-4, rtol=0)
        p, t = interp.preds[i].argmax(), interp.targs[i]
        title = ax.get_title(loc='left')
        assert title == f'{learn.dls.vocab[p]} / {learn.dls.vocab[t]} / {loss.item():.2f} / {interp.preds[i].max().item():.2f}'
        assert ax._left_title.get_color() == ('black' if p == t else '#D55E00')

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
    for f in ('spectrum', 'response', 'cam', 'top_losses'): figures[f](l)
    drawn = l.show_resized(items=[0]).axes[0].images[0].get_array()
    assert drawn.shape == (32, 32)   # one channel
    np.testing.assert_allclose(drawn, np.array(PILImageBW.create(dls.valid_ds.items[0]).resize((32, 32)))/255, atol=0.2)

def test_several_labels_an_image(tmp_path):
    make_images(tmp_path, [f'{i}.png' for i in range(8)])
    df = pd.DataFrame(dict(name=[f'{i}.png' for i in range(8)], labels=['x', 'x y', 'y', 'x']*2))
    dls = ImageDataLoaders.from_df(df, tmp_path, fn_col='name', label_col='labels', label_delim=' ', valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0)
    l = resizer_learner(dls, resnet18, size=16, **plain)
    with pytest.raises(ValueError, match='pass items'): l.show_resized()
    assert set(l.show_resized(items=[0]).axes[0].get_ylabel().split(';')) <= {'x', 'y'}
    fig = l.show_cam(items=[0], target='x')
    with torch.no_grad(): p = torch.sigmoid(l.model.eval()(l.dls.valid.new(bs=1, shuffle=False).one_batch()[0]))
    assert fig.axes[1].get_xlabel() == f'x, {p[0, 0].item():.2f}'
    l.interpret().plot_top_losses(2)
    l.add_cb(Film(n=2))
    fit(l, 1, 1e-3)
    assert len(l.film.frames[0]) == 2

def test_images_of_a_data_frame(tmp_path):
    make_images(tmp_path, [f'{i}.png' for i in range(24)])
    df = pd.DataFrame(dict(name=[f'{i}.png' for i in range(24)], label=list('ab')*12), index=range(100, 124))
    dls = ImageDataLoaders.from_df(df, tmp_path, fn_col='name', label_col='label', valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0)
    interp = resizer_learner(dls, resnet18, size=16, **plain).interpret()
    fig = interp.plot_top_losses(3)
    for ax, i in zip(fig.axes[::2], interp.top_losses(3)[1]):
        item = dls.valid_ds.items.iloc[int(i)]
        x = resized_views(interp.learn.model, interp.learn.model.read_batch(tmp_path/item['name']))['input'][0]
        assert np.corrcoef(ax.images[0].get_array().ravel(), x.permute(1, 2, 0).numpy().ravel())[0, 1] > 0.9
        assert ax.get_title(loc='left').split(' / ')[1] == item.label
    assert interp.show_results([0]).axes[0].get_title(loc='left').split('\n')[0] == dls.valid_ds.items.iloc[0].label

@pytest.mark.parametrize('items,says', [([True, False], 'no mask'), ([0, 'a.png'], 'not both'), ([0.5], 'not both'), ([-1], 'holds 20 images'), ([20], 'holds 20 images'), ([], 'no images')])
def test_items_that_make_no_sense(learn, items, says):
    with pytest.raises(ValueError, match=says): learn.show_resized(items=items)

@pytest.mark.parametrize('kwargs,says', [(dict(classes='tweed'), 'no class tweed'), (dict(controls=['none']), 'got none'), (dict(controls='learned'), 'got learned'), (dict(scale='log'), 'scale is')])
def test_options_that_make_no_sense(learn, kwargs, says):
    with pytest.raises(ValueError, match=says): learn.show_resized(**kwargs)

def test_a_class_without_validation_images(tmp_path):
    make_images(tmp_path, [f'train/{c}/{i}.png' for c in 'abc' for i in range(4)] + [f'val/{c}/{i}.png' for c in 'ab' for i in range(4)])
    l = resizer_learner(get_dls(tmp_path, size=32, bs=4, num_workers=0), resnet18, size=16, **plain)
    assert [o.get_ylabel() for o in l.show_resized().axes[:12:6]] == ['a', 'b']
    for f in (l.show_resized, l.plot_spectrum):
        with pytest.raises(ValueError, match='no validation image of c'): f(classes=['a', 'c'])

def test_fewer_or_more_channels_have_no_picture():
    l = small(resizer_args=dict(out_channels=6))
    with pytest.raises(ValueError, match='from 3 to 6 channels has no image'): l.show_resized()

def test_a_body_without_maps_has_no_cam():
    l = small(64, 32)
    l.model.body, l.model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 10)
    with pytest.raises(ValueError, match='needs a body that puts out maps'): l.show_cam(items=[0])

def test_a_class_may_be_called_anything(tmp_path):
    "Dollars are no formula, and mark-up is text"
    names = ['$cash$', 'a_$^{$', '<b>&amp;', os.fsdecode(b'bad\xff'), 'x'*100]
    make_images(tmp_path/'data', [f'{c}/{i}.png' for c in names for i in range(8)])
    learn = resizer_train(data=tmp_path/'data', valid_pct=0.5, arch='resnet18', size=64, out=32, epochs=1, bs=4, workers=0, runs=tmp_path)
    assert sorted(o.get_ylabel() for o in learn.show_resized().axes[:30:6]) == sorted([*names[:3], 'bad\ufffd', 'x'*27 + '…'])
    html = (learn.path/'report.html').read_text()
    assert '&lt;b&gt;&amp;amp;' in html and '<b>&' not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and '<script' not in html and len(html) < 5e6
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', html)) and html.count('<img') >= 7

def test_a_report_is_made_of_what_lies_in_the_folder(tmp_path):
    learn = resizer_train(data='sample', limit=20, arch='resnet18', size=64, out=32, epochs=1, bs=10, workers=0, runs=tmp_path)
    html = (learn.path/'report.html').read_text()
    run = json.loads((learn.path/'run.json').read_text())
    for o in (run['command'], run['data']['fingerprint'], run['versions']['torch'], f'{run["parameters"]["resizer"]:,}', f'{100*run["metrics"]["accuracy"]:.2f} %'): assert o in html
    (learn.path/'report.html').unlink()
    assert run_report(learn.path).read_text() == html
    for kind, sizes in dict(learned='64 -&gt; 32', none='64', pil='32').items():
        (learn.path/'run.json').write_text(json.dumps(run | dict(args=run['args'] | dict(resizer=kind))))
        assert f'behind the resizer &#34;{kind}&#34;, {sizes} pixels' in run_report(learn.path).read_text()
    facts = dict(re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', html))
    assert float(facts['multiply-adds, all'].split()[0]) > float(facts['multiply-adds, resizer'].split()[0]) == round(run['multiply_adds']['resizer']/1e9, 3)
    assert facts['inference, images/s'] == f'{run["metrics"]["inference_images_per_second"]:.0f}' and 1 < run['metrics']['inference_images_per_second'] < 1e5
    preds = np.load(learn.path/'preds.npz')
    rows = re.findall(r'<tr><td class="text">(grain-\d+)</td><td class="text">(grain-\d+)</td><td class="number">(\d+)</td></tr>', html)
    classes = run['data']['classes']
    for t, p, n in rows: assert ((preds['targets'] == classes.index(t)) & (preds['probs'].argmax(1) == classes.index(p))).sum() == int(n)
    assert rows
    left, right = plot_curves(metrics := pd.read_csv(learn.path/'metrics.csv')).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [metrics.train_loss.tolist(), metrics.valid_loss.tolist()] and right.lines[0].get_ydata().tolist() == (100*metrics.accuracy).tolist()
    (learn.path/'run.json').write_text(json.dumps(run | dict(metrics=None)))
    for f in (run_report, load_run):
        with pytest.raises(UsageError, match='is not finished'): f(learn.path)
    with pytest.raises(UsageError, match='no run of this project'): run_report(tmp_path)

def test_a_run_that_is_taken_up_again_sees_what_it_saw(tmp_path):
    "Predictions are the run's, with the statistics that stand beside its model, and all pictures can be drawn"
    path = resizer_train(data='sample', limit=20, arch='resnet18', resizer='bilinear', size=64, out=32, epochs=1, bs=10, workers=0, precision='fp32', runs=tmp_path).path
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
    "Until it fits; pictures that are JPEG already are called so"
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), dtype=np.uint8)
    for ext in ('png', 'jpg'): PILImage.create(noise).save(tmp_path/f'a.{ext}')
    for n, ext in ((3, 'png'), (12, 'jpg')):
        file = write_report(tmp_path/'r.html', 'big', ['字'*1000], [], [section('one', pictures=[picture(tmp_path/f'a.{ext}', 'noise')]*n)])
        assert 1e6 < file.stat().st_size < 5e6
    file = write_report(tmp_path/'r.html', 'small', [], [], [section('one', pictures=[picture(tmp_path/'a.jpg', 'noise')])])
    for kind, data in re.findall(r'data:image/(\w+);base64,([^"]+)', file.read_text()): assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).format.lower() == kind

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

def test_explore_with_pixels_in_channels():
    "The plain resize beside it is the image, moved into channels as the resizer's skip does"
    pytest.importorskip('ipywidgets')
    l = small(resizer_args=dict(out_channels=12, skip_mode='unshuffle'))
    with torch.no_grad():
        l.resizer.out.weight.zero_()
        if l.resizer.out.bias is not None: l.resizer.out.bias.zero_()
    _, probs = _explored(l, 0)
    torch.testing.assert_close(probs[0], probs[1], atol=1e-5, rtol=0)
    assert explore(l).children[1].value

def test_missing_ipywidgets_is_one_sentence(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(UsageError, match='pip install ipywidgets'): explore(learn)

def test_the_template_is_installed(tmp_path):
    pytest.importorskip('setuptools')
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', tmp_path], cwd=repo, check=True, capture_output=True)
    assert {o.relative_to(tmp_path) for o in tmp_path.rglob('*.html')} == {o.relative_to(repo) for o in (repo/'resizer_fastai').rglob('*.html')} != set()
