"""When does sparse attention pay? Predictions from a few seconds of timing on the device itself.

`model` predicts and fits, `measure` times, `store` keeps what was measured for later processes.
"""

from .model import Profile as Profile
from .model import Workload as Workload
from .model import break_even as break_even
from .store import profile_of as profile_of
