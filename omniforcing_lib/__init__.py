"""OmniForcing you can step through: a causal audio-video generator, from masks to a live stream.

Importing the package loads nothing heavy; each module (`layout`, `masks`, `transformer`, `rollout`, ...) is imported
by name when it is used.

Threads that spin while they wait cost more than they save on few or busy cores. OpenMP reads how its threads wait when
torch is imported, so the package sets `OMP_WAIT_POLICY=PASSIVE` if it is not set: import the package before torch. A
log line of level INFO tells what was done.
"""

import logging
import os
import sys

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for the processes that this one starts, in any case
    late = "torch" in sys.modules
    effect = "too late for this process: torch is imported" if late else "waiting threads sleep"
    logging.getLogger(__name__).info("OMP_WAIT_POLICY=PASSIVE: %s", effect)
