"""Core of vlm-collab: messages, sans-I/O sessions, geometry, image codecs, uncertainty, regions.

Imports nothing heavy: neither torch nor numpy is needed to import this package. The modules
that compute on arrays (`vlm_collab.method.uncertainty`, `vlm_collab.method.roi`) need numpy and are
imported by name.
"""

from __future__ import annotations

__version__ = "0.2.0"
