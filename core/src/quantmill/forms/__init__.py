"""Canonical forms: what a quantized tensor is, independent of any file or kernel."""

from quantmill.forms.affine import Affine
from quantmill.forms.base import Form, FormValue, float_rows, value_of
from quantmill.forms.codebook import Codebook, nearest_on_grid, register_table, table_values
from quantmill.forms.codes import Codes
from quantmill.forms.grouping import (
    Blocks,
    Channel,
    Flat,
    Group,
    Grouping,
    PerTensor,
    Strided,
)
from quantmill.forms.scaled_float import ScaledFloat

__all__ = [
    "Affine",
    "Blocks",
    "Channel",
    "Codebook",
    "Codes",
    "Flat",
    "Form",
    "FormValue",
    "Group",
    "Grouping",
    "PerTensor",
    "ScaledFloat",
    "Strided",
    "float_rows",
    "nearest_on_grid",
    "register_table",
    "table_values",
    "value_of",
]
