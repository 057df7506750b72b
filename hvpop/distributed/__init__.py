"""The same operators over many processes, on torch.distributed."""

from .errors import RankLost, RemoteError
from .gathering import gathered
from .journal import Journal
from .models import ShardedModelHessian
from .parallel import DataParallel
from .sharded import Sharded
from .team import Team, Traffic, init

__all__ = [
    "DataParallel",
    "Journal",
    "RankLost",
    "RemoteError",
    "Sharded",
    "ShardedModelHessian",
    "Team",
    "Traffic",
    "gathered",
    "init",
]
