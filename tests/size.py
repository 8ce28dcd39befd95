"How large the library is: lines, tokens, names and cells of each module. Run by `make size`."
import ast, io, json, tokenize
from pathlib import Path
import pandas as pd

repo = Path(__file__).parent.parent
skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}

def tokens(source):
    "Tokens as Python's `tokenize` finds them; strings count, comments do not"
    return sum(t.type not in skipped for t in tokenize.generate_tokens(io.StringIO(source).readline))

def is_shown(source):
    "Whether a line of a lesson shows something: an assertion, a value at the end of a cell, a picture"
    return source.strip() and not source.lstrip().startswith(('#', 'import ', 'from ', 'print('))

def notebook(path):
    "Cells, exported lines, and lines that show"
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    exported = [s for s in cells if s.startswith('#| export')]
    lessons = [s for s in cells if not s.startswith(('#| export', '#| hide', '#| default_exp'))]
    lines = lambda sources: sum(bool(is_shown(o)) for s in sources for o in s.splitlines())
    return dict(cells=len(cells), exported=lines(exported), shown=lines(lessons), longest_cell=max((len(s.splitlines()) for s in exported), default=0))

def module(path):
    source = path.read_text()
    tree = ast.parse(source)
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), [])
    defs = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    long = sum(len(o) > 120 for o in source.splitlines())
    return dict(lines=len(source.splitlines()), tokens=tokens(source), definitions=len(defs), names=len(public), over_120=long)

def table():
    rows = {}
    for nb in sorted((repo/'nbs').glob('[0-9]*.ipynb')):
        name = nb.stem.split('_', 1)[1]
        rows[nb.stem] = module(repo/'resizer_fastai'/f'{name}.py') | notebook(nb)
    df = pd.DataFrame(rows).T
    df.loc['all'] = df.sum()
    df.loc['all', 'longest_cell'] = df.longest_cell[:-1].max()
    return df

if __name__ == '__main__': print(table().to_string())
