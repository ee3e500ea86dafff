"""WEIGHTS IN AND OUT: the same model in our layout, in a diffusers folder, and in the original's files."""

from __future__ import annotations

from vdm.interop.links import Allowed
from vdm.interop.model import StoredModel
from vdm.interop.store import open_model

__all__ = ["Allowed", "StoredModel", "open_model"]
