"""The public API: what ``mrpo_lab`` exports, and from where. ``__init__.py`` reads this file."""

__all__: list[str]

from .data.dataset import FileDataset as FileDataset
from .data.lists import ListDataset as ListDataset
from .embedded.datasets import StarterDataset as StarterDataset
from .embedded.datasets import SyntheticDataset as SyntheticDataset
from .models.policy import PolicyConfig as PolicyConfig
from .models.references import ReferenceSet as ReferenceSet
from .objective.aspect_weighting import DirichletLambda as DirichletLambda
from .objective.aspect_weighting import FixedLambda as FixedLambda
from .objective.aspect_weighting import LearnedLambda as LearnedLambda
from .objective.aspect_weighting import TableLambda as TableLambda
from .objective.losses import LossOutput as LossOutput
from .objective.losses import PreferenceLoss as PreferenceLoss
from .objective.losses import ctro as ctro
from .objective.losses import dpo as dpo
from .objective.losses import geometric as geometric
from .objective.losses import hinge as hinge
from .objective.losses import ipo as ipo
from .objective.losses import listwise as listwise
from .objective.losses import logistic as logistic
from .objective.losses import mdpo as mdpo
from .objective.losses import mrpo as mrpo
from .objective.losses import no_clip as no_clip
from .objective.losses import robust as robust
from .objective.scores import Scores as Scores
from .objective.weighting import ARWC as ARWC
from .objective.weighting import RMC as RMC
from .objective.weighting import SWCW as SWCW
from .objective.weighting import TSW as TSW
from .objective.weighting import VAW as VAW
from .objective.weighting import VDW as VDW
from .objective.weighting import VSW as VSW
from .objective.weighting import Context as Context
from .objective.weighting import Fixed as Fixed
from .objective.weighting import Grid as Grid
from .objective.weighting import Single as Single
from .objective.weighting import SWCWOneHot as SWCWOneHot
from .objective.weighting import Uniform as Uniform
from .objective.weighting import Weighting as Weighting
from .runs.tracking import LocalTracker as LocalTracker
from .runs.tracking import WandbTracker as WandbTracker
from .scoring.scorer import ReplyScorer as ReplyScorer
from .seeding import Seeds as Seeds
from .training.config import TrainConfig as TrainConfig
