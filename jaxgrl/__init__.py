"""Gradient reversal for JAX: the identity forward, minus scale times the gradient."""

from ._cdan import entropy_weights as entropy_weights
from ._cdan import multilinear_map as multilinear_map
from ._dann import DANNOutput as DANNOutput
from ._domain_metrics import domain_accuracy as domain_accuracy
from ._domain_metrics import domain_loss as domain_loss
from ._domain_metrics import domain_weights as domain_weights
from ._evaluation import ProxyADistance as ProxyADistance
from ._evaluation import information_maximization as information_maximization
from ._evaluation import proxy_a_distance as proxy_a_distance
from ._gradient_reversal import ScaleLike as ScaleLike
from ._gradient_reversal import gradient_reversal as gradient_reversal
from ._reversal_report import Finding as Finding
from ._reversal_report import LeafReport as LeafReport
from ._reversal_report import ReversalReport as ReversalReport
from ._reversal_report import reversal_report as reversal_report
from ._schedules import dann_learning_rate as dann_learning_rate
from ._schedules import dann_schedule as dann_schedule

__version__ = "0.1.0"
