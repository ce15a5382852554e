"""OmniForcing you can step through: a causal audio-video generator, from masks to a live stream.

Importing the package loads nothing heavy; each room (`layout`, `masks`, `transformer`, `rollout`, ...) is imported
by name when it is used.
"""

__version__ = "0.1.0"
