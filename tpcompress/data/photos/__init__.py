"""Visual questions about scenes of photographs: cut-outs on photographic backgrounds, for pruners on a real encoder.

`scripts/build_photos.py` fetches the photographs; none of them is in this package.
"""

from tpcompress.data.photos.builder import load_photos, make_row
from tpcompress.data.photos.questions import FAMILIES, ONE_PATCH
from tpcompress.data.photos.store import Photographs

__all__ = ["FAMILIES", "ONE_PATCH", "Photographs", "load_photos", "make_row"]
