"Pictures of any learner that leave no trace, films that survive, reports that need nothing else"
import io, random, re, sys
import matplotlib.pyplot as plt, numpy as np, pandas as pd, PIL.Image, pytest, torch
from fastai.vision.all import (
    Callback, CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, MultiCategoryBlock, PILImage, PILImageBW,
    RandomSplitter, RegressionBlock, Resize, deepcopy, get_image_files, get_model, load_learner, nn, parent_label,
    resnet18, set_seed)
from conftest import make_images
from resizer_fastai.data import get_dls
from resizer_fastai.learner import plain_head, resizer_learner
from resizer_fastai.resizer import Resizer
from resizer_fastai.show import Film, ResizerPictures, class_spectra, explore, resized_views, write_report

def small(dls=None, size=32, out=16, **kwargs):
    set_seed(0)
    dls = dls or get_dls('sample', size=size, bs=10, limit=20, num_workers=0)
    return resizer_learner(dls, resnet18, size=out, **dict(pretrained=False) | plain_head | kwargs)

def fit(l, n=1):
    with l.no_bar(), l.no_logging(): l.fit(n, 1e-3)

def interpret(l):
    with l.no_bar(): return l.interpret()

def drawn(ax): return torch.tensor(np.array(ax.images[0].get_array()))

figures = dict(
    resized=lambda l: l.show_resized(), spectrum=lambda l: l.plot_spectrum(per_class=1),
    response=lambda l: l.plot_response(n=4), cam=lambda l: l.show_cam(items=[0]),
    losses=lambda l: interpret(l).plot_top_losses(3), results=lambda l: interpret(l).show_results([1]))

@pytest.fixture(scope='module')
def learn(): return small()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('a'), [f'{c}/{i}.png' for c in 'ab' for i in range(8)])

def test_looking_changes_nothing():
    "Weights, statistics, modes, gradients, the next random numbers, other figures"
    l, mine = small(), plt.figure()
    l.model.body.eval()
    def state(): return [l.model.state_dict(), [m.training for m in l.model.modules()], l.model.resizer.out.weight.grad]
    before = deepcopy(state())
    set_seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    set_seed(1)
    for f in [*figures.values(), lambda l: interpret(l).plot_confusion_matrix()]: assert isinstance(f(l), plt.Figure)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected and not mine.axes
    torch.testing.assert_close(state(), before, rtol=0, atol=0)

class Brighter(Callback):
    def before_validate(self): get_model(self.model).resizer.out.bias.data += 5

def test_film_records_what_is_validated():
    "Also if the model is wrapped: on a CPU, DataParallel only passes the batch on"
    l = small(cbs=[Film(n=1), Brighter()])
    l.create_opt()
    l.model = nn.DataParallel(l.model)
    fit(l)
    assert (l.film.frames[1]-l.film.frames[0]).mean() > 0.8

class Stop(Callback):
    def before_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt

def test_film_of_what_happens_in_between(tmp_path):
    "An interrupted fit with validation after it, lr_find, another size, resuming; an export has no images"
    l = small(cbs=[Film(n=1), Stop()], path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(l, 2)
    l.remove_cb(Stop)
    with l.no_bar(), l.no_logging(): l.validate(), l.lr_find(num_it=12, show_plot=False)
    torch.save({k: getattr(l.film, k) for k in ('frames', 'batch', 'labels')}, tmp_path/'film.pt')
    other = small(cbs=Film(n=1), out=12, path=tmp_path)
    vars(other.film).update(torch.load(tmp_path/'film.pt', weights_only=True))
    fit(other)
    assert [f.shape[-1] for f in other.film.frames] == [16, 16, 12]
    assert [ax.get_title() for ax in other.plot_film().axes] == ['start', 'epoch 0', 'epoch 1']
    other.export('e.pkl')
    assert load_learner(tmp_path/'e.pkl').film.batch is None

@pytest.mark.parametrize('scale', ['std', 'clip'])
def test_show_resized_has_one_range_and_a_signed_difference(learn, scale):
    fig = learn.show_resized(items=[3, 0], controls=('antialias', 'bilinear'), scale=scale)
    axs = np.array(fig.axes[:10]).reshape(2, 5)
    titles = [ax.get_title().split(',')[0] for ax in axs[0]]
    assert titles == ['input', 'antialias', 'bilinear', 'learned', 'learned - antialias']
    lo, hi = map(float, re.findall(r'(-?[\d.]+) to (-?[\d.]+)', axs[0, 3].get_title())[-1])
    x = learn.model.read_batch([learn.dls.valid_ds.items[i] for i in (3, 0)])
    for row, _, plain, y in zip(axs, *resized_views(learn.model, x, 'antialias').values()):
        torch.testing.assert_close(drawn(row[3]).permute(2, 0, 1), ((y-lo)/(hi-lo)).clamp(0, 1), atol=0.02, rtol=0)
        torch.testing.assert_close(drawn(row[-1]), (y-plain).mean(0), atol=1e-5, rtol=0)

def test_class_spectra_of_images_that_are_not_square():
    "Up to the Nyquist limit of the coarser side, in cycles per pixel of the input"
    l = small(size=(40, 24), out=(10, 12))
    curves = class_spectra(l, 1, 'grain-27')['grain-27']
    limit, *lines = l.plot_spectrum(per_class=1, classes='grain-27').axes[0].lines
    assert curves['resized'][0][-1].item() == limit.get_xdata()[0] == pytest.approx(0.5*10/40)
    for line, (f, p) in zip(lines, curves.values(), strict=True): np.testing.assert_allclose(line.get_ydata(), p)

def test_show_cam_lies_on_the_image(learn):
    fig = learn.show_cam(items=[0], target='grain-45')
    assert fig.axes[1].get_xlabel() == f'grain-45, {learn.model.predict(learn.dls.valid_ds.items[0])[2][0, 9]:.2f}'
    for ax, n in zip(fig.axes[1:3], (32, 16)):
        for im in ax.images: assert list(im.get_extent()) == [-0.5, n-0.5, n-0.5, -0.5]

def test_plot_top_losses_shows_its_own_images(folder):
    "In the order of the losses; wrong ones are coloured; the index of a table need not be its rows"
    files = sorted(folder.rglob('*.png'))
    df = pd.DataFrame(dict(name=files, label=[f.parent.name for f in files]), index=range(100, 116))
    dls = ImageDataLoaders.from_df(df, '/', fn_col='name', label_col='label', valid_pct=0.5, seed=0, bs=4,
                                   item_tfms=Resize(32), num_workers=0)
    interp = interpret(small(dls))
    for ax, loss, i in zip(interp.plot_top_losses(3).axes[::2], *interp.top_losses(3)):
        name, target = dls.valid_ds.items.iloc[int(i)]
        assert np.corrcoef(drawn(ax).ravel(), np.array(PILImage.create(name).resize((32, 32))).ravel())[0, 1] > 0.9
        p, guess = interp.preds[i].max().item(), interp.vocab[interp.preds[i].argmax()]
        assert ax.get_title(loc='left') == f'{guess} / {target} / {loss.item():.2f} / {p:.2f}'
        assert ax._left_title.get_color() == ('black' if guess == target else '#D55E00')

several = MultiCategoryBlock, lambda f: ['x', 'y'][int(f.stem)%3//2:]
values = RegressionBlock, lambda f: float(f.stem)
grey = CategoryBlock, parent_label

@pytest.mark.parametrize('target,get_y', [several, values, grey], ids=['several', 'values', 'grey'])
def test_figures_of_other_targets_and_of_grey_images(folder, target, get_y):
    blocks = ImageBlock(PILImageBW if target is CategoryBlock else PILImage), target
    dls = DataBlock(blocks, get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.5, seed=0),
                    item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0)
    l = small(dls, cbs=Film(n=2), n_in=dls.one_batch()[0].shape[1])
    fit(l)
    for f in figures.values(): f(l)
    y, ax = get_y(dls.valid_ds.items[0]), l.show_resized(items=0).axes[0]
    assert ax.get_ylabel() == (f'{y:g}' if target is RegressionBlock else ';'.join(y)) in l.film.labels
    if target is CategoryBlock: assert drawn(ax).shape == (32, 32)
    else:
        with pytest.raises(ValueError, match='one class per image'): interpret(l).plot_confusion_matrix()

def test_figures_of_classes_with_any_name(tmp_path):
    names = ['$cash$', 'a_$^{$', 'two\nlines', b'bad\xff'.decode(errors='surrogateescape'), 'x'*100]
    make_images(tmp_path, [f'{c}/{i}.png' for c in names for i in range(4)])
    l = small(get_dls(tmp_path, size=32, bs=10, valid_pct=0.5, num_workers=0))
    for name in ('resized', 'spectrum', 'cam', 'losses'): figures[name](l).canvas.draw()
    interpret(l).plot_confusion_matrix().canvas.draw()
    labels = [ax.get_ylabel() for ax in l.show_resized().axes[:20:4]]
    assert sorted(labels) == sorted([r'\$cash\$', r'a_\$^{\$', names[2], 'bad\ufffd', 'x'*27+'…'])

def test_write_report_is_self_contained_and_escapes(tmp_path):
    PIL.Image.new('RGB', (1500, 100)).save(tmp_path/'a.png')
    rows = [['<b>&amp;', 1, float('nan')], [b'bad\xff'.decode(errors='surrogateescape'), 2, 0.123456]]
    picture = dict(file=tmp_path/'a.png', alt='a "word"')
    seen = dict(title='One', text=['<script>'], table=(list('abc'), rows), pictures=[picture])
    html = write_report(tmp_path/'r.html', 'A & B', ['<i>'], [('accuracy', 1)], [seen]).read_text()
    assert '&lt;b&gt;&amp;amp;' in html and '0.1235' in html and not re.search('<(b|i|script)>', html)
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert re.search('(?s)class="wide".*?data:image/jpeg;.*?alt="a &#34;word&#34;"', html)

def test_explore_turns_pages(learn):
    pytest.importorskip('ipywidgets')
    controls, page = explore(learn).children
    (which, nth), seen = controls.children, [page.value]
    for widget, value in ((nth, 1), (which, 'grain-45')):
        widget.value = value
        seen.append(page.value)
    assert len(set(seen)) == 3 and all(PIL.Image.open(io.BytesIO(o)).size[0] > 900 for o in seen)
    assert (nth.value, nth.max) == (0, 1)

def test_explore_without_ipywidgets(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(ValueError, match=r'pip install resizer_fastai\[explore\]'): explore(learn)


def test_pictures_of_a_resizer_alone():
    pictures = ResizerPictures(Resizer(16), [0.5]*3, [0.25]*3, input_size=(32, 48))
    x = torch.randn(4, 3, 32, 48)
    for fig in (pictures.show_resized(items=x), pictures.plot_spectrum(items=x), pictures.plot_response(n=4)): plt.close(fig)
    for call in (pictures.show_resized, pictures.plot_spectrum, lambda: pictures.show_resized(items=['a.png']), lambda: pictures.show_resized(items=[0])):
        with pytest.raises(ValueError, match='pass items: a normalised batch'): call()
