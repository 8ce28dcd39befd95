"What only a browser can show: `explore` in JupyterLab, and reports on a desk and on a phone. Run by `make test-browser`."
import json, re, subprocess, sys, time
from pathlib import Path
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import Select, WebDriverWait

sys.path.append(str(Path(__file__).parent.parent))
from conftest import make_images

@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    for o in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1280,900'): options.add_argument(o)
    driver = webdriver.Chrome(options=options, service=Service('/usr/bin/chromedriver'))
    yield driver
    driver.quit()

def cell(source): return dict(cell_type='code', execution_count=None, id=f'c{len(source)}', metadata={}, outputs=[], source=source)

@pytest.fixture
def lab(tmp_path):
    "A JupyterLab on a notebook that explores a learner; its address"
    code = '''from fastai.vision.all import *
from resizer_fastai.all import *
learn = resizer_learner(get_dls('sample', size=64, bs=20, limit=40, num_workers=0), resnet18, size=32, pretrained=False)'''
    kernel = dict(name='python3', display_name='Python 3', language='python')
    (tmp_path/'look.ipynb').write_text(json.dumps(dict(cells=[cell(code), cell('explore(learn)')], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', '--port=0', '--expose-app-in-browser', f'--ServerApp.root_dir={tmp_path}']
    log = tmp_path/'lab.log'
    with open(log, 'w') as out, subprocess.Popen(command, stdout=out, stderr=out) as p:
        for _ in range(120):
            if found := re.search(r'http://(localhost|127\.0\.0\.1):\d+/lab\?token=\w+', log.read_text()): break
            time.sleep(0.5)
        else: p.terminate(); pytest.fail(log.read_text())
        yield found[0].replace('/lab?', '/lab/tree/look.ipynb?')
        p.terminate()

def test_explore_in_jupyterlab(lab, browser, tmp_path):
    browser.get(lab)
    wait = WebDriverWait(browser, 120, 0.5)
    def ready(_):
        return browser.execute_script("return !!(window.jupyterapp && document.querySelectorAll('.jp-Notebook .jp-Cell').length > 1)")
    wait.until(ready)
    time.sleep(3)
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page = lambda: browser.find_elements(By.CSS_SELECTOR, 'img.widget-image')
    wait.until(lambda _: page() and page()[0].get_attribute('naturalWidth') not in (None, '0'))
    picture = lambda: browser.execute_async_script('''const done = arguments[1];
        fetch(arguments[0].src).then(r => r.arrayBuffer()).then(b => crypto.subtle.digest('SHA-256', b)).then(h => done(Array.from(new Uint8Array(h)).join()))''', page()[0])
    first = picture()
    classes = Select(browser.find_element(By.CSS_SELECTOR, '.widget-dropdown select'))
    browser.save_screenshot(str(tmp_path/'before.png'))
    classes.select_by_visible_text('grain-45')
    wait.until(lambda _: picture() != first)
    second = picture()
    [o for o in browser.find_elements(By.CSS_SELECTOR, '.widget-toggle-button') if o.text == 'slider'][0].click()
    wait.until(lambda _: picture() not in (first, second))
    browser.save_screenshot(str(tmp_path/'after.png'))

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "The report of a comparison on classes with awkward names, and that of one of its runs"
    from resizer_fastai.compare import resizer_compare
    root = tmp_path_factory.mktemp('report')
    names = ['<script>alert(1)<', '$cash$ & "more"']   # no slash: it would be a folder in a folder
    make_images(root/'data', [f'{c}/{i}.png' for c in names for i in range(12)], (48, 48))
    resizer_compare(arms='bilinear,learned', data=root/'data', valid_pct=0.5, arch='resnet18', size=32, out=16, epochs=1, bs=4, workers=0, runs=root, name='two')
    return root/'two'/'report.html', next((root/'two').glob('*learned*'))/'report.html'

@pytest.mark.parametrize('width', [1280, 390])
def test_reports_fit_and_say_names_as_they_are(report, browser, width, tmp_path):
    for file in report:
        browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
        browser.get(file.as_uri())
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width
        assert browser.execute_script("return [...document.images].every(o => o.complete && o.naturalWidth > 0 && o.alt)")
        assert not browser.execute_script("return performance.getEntriesByType('resource').filter(o => !o.name.startsWith('data:')).length")
        assert not browser.find_elements(By.TAG_NAME, 'script')
        browser.save_screenshot(str(tmp_path/f'{file.parent.name}-{width}.png'))
    browser.get(report[1].as_uri())
    assert '<script>alert(1)<' in browser.find_element(By.TAG_NAME, 'main').text
