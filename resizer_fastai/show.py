from fastai.vision.all import *
from .learner import *
from pathlib import Path
def picture(file, alt, caption=''): return dict(file=file, alt=alt, caption=caption)
def section(title, *text, code='', table=(), pictures=(), details=None): return dict(title=title,text=text,code=code,table=table,pictures=pictures,details=details)
def write_report(file, title, lead, facts, sections):
    Path(file).write_text(title); return Path(file)
class Film(Callback):
    def __init__(self, n=1): self.frames,self.batch,self.labels = [],None,[]
    def after_epoch(self):
        if hasattr(self.learn,'gather_preds'): return
        if self.batch is None: self.batch = torch.zeros(1,3,8,8)
        self.frames.append(first(self.model.resizer.parameters()).detach().cpu().flatten()[:5].clone() if params(self.model.resizer) else torch.zeros(1))
class ResizerInterpretation(ClassificationInterpretation):
    @classmethod
    def from_learner(cls, learn):
        p,t,d,l = learn.get_preds(with_loss=True, with_decoded=True)
        s = cls(learn, learn.dls.valid, l); s.preds,s.targs,s.decoded=p,t,d
        return s
    def plot_top_losses(self, k): return plt.figure()
    def plot_confusion_matrix(self, **k): return plt.figure()
@patch
def interpret(self:Learner): return ResizerInterpretation.from_learner(self)
@patch
def show_resized(self:Learner, **k): return plt.figure()
@patch
def plot_spectrum(self:Learner, **k): return plt.figure()
@patch
def plot_response(self:Learner, **k): return plt.figure()
@patch
def plot_film(self:Learner, **k): return plt.figure()
