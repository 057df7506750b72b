"""The same operators over many processes, on torch.distributed."""

from .errors import RankLost, RemoteError
from .parallel import DataParallel
from .sharded import Sharded
from .team import Team, Traffic, init

__all__ = ["DataParallel", "RankLost", "RemoteError", "Sharded", "Team", "Traffic", "init"]
