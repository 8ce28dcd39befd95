"Write README.md, and its pictures, from index.ipynb; `--check` only says whether they are what the notebook says."
import base64, json, re, sys
from pathlib import Path

nbs = Path(__file__).parent
pictures = {'image/png': 'png', 'image/jpeg': 'jpg'}

def text(o): return ''.join(o) if isinstance(o, list) else o

def linked(s): return re.sub(r'\]\(([\w/-]+\.(ipynb|jpg|png))\)', r'](nbs/\1)', s)

def output(out, files, alt):
    data = out.get('data', {})
    for kind, ext in pictures.items():
        if kind in data:
            name = f'images/index-{len(files)}.{ext}'
            files[nbs/name] = base64.b64decode(text(data[kind]))
            return f'![{alt}](nbs/{name})'
    if 'text/html' in data: return text(data['text/html']) if '<table' in text(data['text/html']) else ''
    if 'text/markdown' in data: return linked(text(data['text/markdown']).strip())
    plain = text(data.get('text/plain', out.get('text', '')) if out.get('name') != 'stderr' else '').strip()
    return f'```\n{plain}\n```' if plain else ''

def cell(c, files):
    source = text(c['source']).strip()
    if c['cell_type'] != 'code': return [linked(source)]
    lines = source.split('\n')
    flags = {k.strip(): v.strip() for k, _, v in (o[2:].partition(':') for o in lines if o.startswith('#|'))}
    if 'hide' in flags: return []
    code = '\n'.join(o for o in lines if not o.startswith('#|')).strip()
    shown = [] if 'hide_input' in flags else [f'```python\n{code}\n```']
    outputs = [output(o, files, flags.get('fig-alt', '')) for o in c['outputs']]
    return shown + ([] if 'output' in flags else outputs)   # `output: false`: the picture is shown elsewhere

def readme():
    "Contents of every file that index.ipynb makes"
    files = {}
    cells = json.loads((nbs/'index.ipynb').read_text(encoding='utf-8'))['cells']
    parts = ['<!-- Written from nbs/index.ipynb by nbs/readme.py -->'] + [p for c in cells for p in cell(c, files) if p]
    return {nbs.parent/'README.md': ('\n\n'.join(parts) + '\n').encode()} | files

if __name__ == '__main__':
    for file, content in readme().items():
        if '--check' in sys.argv:
            if not file.exists() or file.read_bytes() != content: sys.exit(f'{file.name} is not what nbs/index.ipynb says: make export')
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
