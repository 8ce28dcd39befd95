"The demo page, driven in Chromium as a person would: `make test-demo`."
import os, re, shutil, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from conftest import make_images

pytest.importorskip('gradio', reason='no gradio: make test-demo')

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The address of a demo of a small model, its process, and its folder"
    import torch
    from resizer_fastai.data import ReadImage
    from resizer_fastai.learner import ResizerClassifier
    path, port = tmp_path_factory.mktemp('demo'), free_port()
    torch.manual_seed(0)
    ResizerClassifier('squeezenet1_1', 3, 'learned', 64, read=ReadImage(128), vocab=['ash', 'oak', '<b>elm</b>']).save_pretrained(path/'model')
    make_images(path, ['a.png', *[f'many/{i}.png' for i in range(20)]], (300, 200))
    (path/'no.png').write_text('no image')
    command = [sys.executable, '-W', 'ignore', '-c', 'from resizer_fastai.ship import resizer_demo; resizer_demo.main()', path/'model', '--port', port]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as p:
        assert 'http://127.0.0.1' in p.stdout.readline()
        yield f'http://127.0.0.1:{port}/', p, path
        p.terminate()

def ask(demo, file):
    from gradio_client import Client, handle_file
    return Client(demo[0], verbose=False).predict(handle_file(file), api_name='/answer')

def test_answer_is_that_of_the_model(demo):
    from resizer_fastai.learner import ResizerClassifier
    answers, *pictures = ask(demo, demo[2]/'a.png')
    names, _, probs = ResizerClassifier.from_pretrained(demo[2]/'model').predict(demo[2]/'a.png')
    assert answers['label'] == names[0] and abs(answers['confidences'][0]['confidence']-probs.max()) < 1e-4
    assert len(pictures) == 3 and all(Path(o).exists() for o in pictures)

def test_other_files_are_answered_in_a_sentence(demo):
    with pytest.raises(Exception, match='this file is no image that can be read'): ask(demo, demo[2]/'no.png')

def test_files_of_the_server_stay_there(demo):
    import httpx
    for file in ('/etc/passwd', demo[2]/'a.png'):
        call = httpx.post(demo[0]+'gradio_api/call/answer', json=dict(data=[dict(path=str(file), meta=dict(_type='gradio.FileData'))])).json()
        assert 'not uploaded by a user' in httpx.get(f'{demo[0]}gradio_api/call/answer/{call["event_id"]}').text
        assert httpx.get(f'{demo[0]}gradio_api/file={file}').status_code == 403

def test_only_this_computer_is_let_in(demo):
    port = int(re.search(r':(\d+)/', demo[0])[1])
    listening = [o.split()[1] for o in Path('/proc/net/tcp').read_text().splitlines()[1:] if o.split()[3] == '0A']
    assert [o for o in listening if o.endswith(f':{port:04X}')] == [f'0100007F:{port:04X}']

def test_large_uploads_are_refused(demo):
    (demo[2]/'large.png').write_bytes(b'0'*21_000_000)
    with pytest.raises(Exception, match='size|large'): ask(demo, demo[2]/'large.png')

def megabytes(p): return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{p.pid}/status').read_text())[1])/1000

def test_twenty_requests_at_once_with_flat_memory(demo):
    def twenty():
        with ThreadPoolExecutor(20) as pool: answers = list(pool.map(lambda i: ask(demo, demo[2]/'many'/f'{i}.png'), range(20)))
        assert len({o[0]['confidences'][0]['confidence'] for o in answers}) > 10
        return megabytes(demo[1])
    used = [twenty() for _ in range(6)]
    print('resident memory after each 20 requests, MB:', used)
    assert used[-1] < 1.05*used[1]

@pytest.mark.parametrize('width', [1280, 390])
def test_upload_in_the_browser(demo, width, tmp_path):
    "The class is read from the page; the screenshot is kept in $SHOTS"
    selenium = pytest.importorskip('selenium.webdriver', reason='no selenium')
    if not (shutil.which('chromedriver') and shutil.which('chromium')): pytest.skip('no chromium and chromedriver')
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    options = selenium.ChromeOptions()
    for o in ('--headless=new', '--no-sandbox', '--hide-scrollbars'): options.add_argument(o)
    options.add_experimental_option('mobileEmulation', dict(deviceMetrics=dict(width=width, height=1100, pixelRatio=1)))
    options.binary_location = shutil.which('chromium')
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which('chromedriver')))
    try:
        browser.get(demo[0])
        upload = WebDriverWait(browser, 30).until(lambda b: b.find_element(By.CSS_SELECTOR, 'input[type=file]'))
        upload.send_keys(str(demo[2]/'a.png'))
        label = ask(demo, demo[2]/'a.png')[0]['label']
        WebDriverWait(browser, 30).until(lambda b: label in b.find_element(By.TAG_NAME, 'body').text and len(b.find_elements(By.CSS_SELECTOR, 'img')) >= 4)
        assert '<b>elm</b>' in browser.find_element(By.TAG_NAME, 'body').text   # as text
        time.sleep(1)
        browser.save_screenshot(str(Path(os.environ.get('SHOTS', tmp_path))/f'demo-{width}.png'))
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width+1
    finally: browser.quit()
