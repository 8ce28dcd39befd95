"Packaging: everything it says comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
suffix = '_requirements'
extras = {k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)}

def readme():
    "README with absolute addresses, which PyPI needs"
    text = Path('README.md').read_text(encoding='utf-8')
    raw = cfg['git_url'].replace('https://github.com', 'https://raw.githubusercontent.com')
    text = re.sub(r'(!\[[^]]*\]\()(?!https?:)', rf'\1{raw}/{cfg["branch"]}/', text)
    return re.sub(r'(\]\()(?!https?:|#)', rf'\1{cfg["git_url"]}/blob/{cfg["branch"]}/', text)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    classifiers=[f'Development Status :: {statuses[int(cfg["status"]) - 1]}', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', f'Natural Language :: {cfg["language"]}',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    long_description=readme(), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], f'{cfg["lib_path"]}.*']), package_data={cfg['lib_path']: ['templates/*', 'py.typed']},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
    zip_safe=False)
