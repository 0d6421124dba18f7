"""The store that cache_format.md describes."""

from .batches import Batch
from .order import class_sorted
from .plan import PixelSpec, SpaceSpec, StorePlan, TeacherRecord
from .reader import Cache
from .rows import RowBatch
from .samples import SampleIndex
from .space import Space
from .statistics import Accumulator, CalibrationSums, Moments, calibration, prediction_weights
from .tokens import Tokens
from .views import View, ViewPolicy
from .writer import StoreWriter

__all__ = [
    "Accumulator",
    "Batch",
    "Cache",
    "CalibrationSums",
    "Moments",
    "PixelSpec",
    "RowBatch",
    "SampleIndex",
    "Space",
    "SpaceSpec",
    "StorePlan",
    "StoreWriter",
    "TeacherRecord",
    "Tokens",
    "View",
    "ViewPolicy",
    "calibration",
    "class_sorted",
    "prediction_weights",
]
