"""Images that Parquet holds as numbers: Arrow's fixed-shape tensors, or lists of lists of uint8.

Hugging Face `datasets` writes its Array2D and Array3D as such lists, under an extension type that only it knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt

from teddy_ray.sources.decoding import BadImageError

CHANNELS = (1, 3, 4)


def storage_type(type_: pa.DataType) -> pa.DataType:
    """What lies under an extension type; fixed-shape tensors stay what they are."""
    is_extension = isinstance(type_, pa.BaseExtensionType) and not isinstance(type_, pa.FixedShapeTensorType)
    return type_.storage_type if is_extension else type_


def is_tensor(type_: pa.DataType) -> bool:
    """Whether a column's values are tensors, of whatever numbers and shape."""
    type_ = storage_type(type_)
    return isinstance(type_, pa.FixedShapeTensorType) or _is_list(type_)


def type_fault(type_: pa.DataType) -> str | None:
    """What is wrong with a tensor column as far as its type tells, None where nothing is."""
    type_ = storage_type(type_)
    if isinstance(type_, pa.FixedShapeTensorType):
        if type_.value_type != pa.uint8():
            return f"tensors should be of uint8, not {type_.value_type}"
        if type_.permutation not in (None, [*range(len(type_.shape))]):
            # pyarrow 26 reads others than it wrote, where more than two dimensions change places
            return f"tensors should be stored in the order of their dimensions, not permuted by {type_.permutation}"
        return layout_fault(tuple(type_.shape))
    depth = 0
    while _is_list(type_):
        type_, depth = type_.value_type, depth + 1
    if type_ != pa.uint8():
        return f"tensors should be of uint8, not {type_}"
    return None if depth in (2, 3) else f"tensors should have 2 or 3 dimensions, not {depth}"


def layout_fault(shape: tuple[int, ...]) -> str | None:
    """Why a shape is no image's, None where it is: (h w), (h w c) or (c h w) with 1, 3 or 4 channels, but not both."""
    if len(shape) == 2 and 0 not in shape:
        return None
    if len(shape) != 3 or 0 in shape or not {shape[0], shape[2]} & set(CHANNELS):
        return f"the shape {shape} is neither (h w) nor (h w c) nor (c h w) with 1, 3 or 4 channels"
    if shape[0] in CHANNELS and shape[2] in CHANNELS:
        return f"the shape {shape} may be (h w c) as well as (c h w); store encoded images instead"
    return None


def to_array(value: Any) -> npt.NDArray[np.uint8] | BadImageError:
    """An Arrow value as an array (h w) or (h w c)."""
    array: npt.NDArray[np.uint8]
    if isinstance(value, pa.FixedShapeTensorScalar):
        array = value.to_numpy()
    else:
        # an extension type's scalar holds the list in its value
        values = value.value.values if isinstance(value, pa.ExtensionScalar) else value.values
        shape = [len(values)]
        while _is_list(values.type):
            lengths = values.value_lengths().unique().to_pylist()
            if len(lengths) != 1 or lengths[0] is None:
                return BadImageError("the rows of its tensor are of different lengths")
            shape.append(lengths[0])
            values = values.flatten()
        if values.null_count:
            return BadImageError("values of its tensor are missing")
        array = values.to_numpy().reshape(shape)
    if fault := layout_fault(array.shape):
        return BadImageError(fault)
    return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] in CHANNELS else array


def _is_list(type_: pa.DataType) -> bool:
    return bool(pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_))
