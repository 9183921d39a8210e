"""Tables from the parameters of a model to the tensors of a checkpoint, for both directions.

A row says where a parameter, or a part of it, lies in a tensor:

    Row("attention/query/weight", "self_attn.q_proj.weight", "NH D", "DNH")

The tensor has dimensions N*H and D, the parameter D, N, H: letters stand for the sizes that the
table gives. Rows of layers leave out the path of the layer on both sides.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

# A slice of a dimension, or its features in another order.
Part = slice | np.ndarray


class Row(NamedTuple):
    """A parameter, or a part of one, and the tensor that it is in.

    Attributes:
        parameter: its path, as 'mlp/gate/weight'.
        tensor: its name.
        tensor_axes: the dimensions of the tensor, each of one or several letters.
        axes: the letters in the order of the parameter's dimensions.
        stacked: the place on a leading dimension of the parameter that stacks several tensors.
        part: a letter, and which features of it the parameter has; None: the tensor is no more.
    """

    parameter: str
    tensor: str
    tensor_axes: str
    axes: str
    stacked: int | None = None
    part: tuple[str, Part] | None = None

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(math.prod(sizes[name] for name in group) for group in self.tensor_axes.split())

    def view(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter in a tensor: a view, where the part is none or a slice."""
        return np.transpose(self._split(tensor, sizes)[self._part()], self._order())

    def write(self, tensor: np.ndarray, values: np.ndarray, sizes: Mapping[str, int]) -> None:
        """Writes the values of a parameter to a tensor, which must be contiguous."""
        self._split(tensor, sizes)[self._part()] = np.transpose(values, np.argsort(self._order()))

    def _split(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return tensor.reshape([sizes[name] for name in self._letters()])

    def _letters(self) -> str:
        return self.tensor_axes.replace(" ", "")

    def _part(self) -> tuple[Part, ...]:
        letter, part = self.part or ("", slice(None))
        return tuple(part if name == letter else slice(None) for name in self._letters())

    def _order(self) -> list[int]:
        return [self._letters().index(name) for name in self.axes]


class Table(NamedTuple):
    """How a model lies in a checkpoint.

    Attributes:
        sizes: of the letters.
        outside: rows of what is in no layer.
        layer: gives the rows of a layer.
        ignored: patterns of tensors that the model has no use for.
        copies: tensors that may be there too, by the name of the one that they must equal.
    """

    sizes: Mapping[str, int]
    outside: tuple[Row, ...]
    layer: Callable[[int], tuple[Row, ...]]
    ignored: tuple[str, ...]
    copies: Mapping[str, str] = MappingProxyType({})


class Place(NamedTuple):
    """A row of the whole model.

    Attributes:
        path: of the parameter in the nested dict.
        stacked: on the leading dimensions of the parameter, its layer in a stack and its row's.
        tensor: full name.
        row: the row.
    """

    path: tuple[str | int, ...]
    stacked: tuple[int, ...]
    tensor: str
    row: Row


def all_places(table: Table, layers: list[tuple[tuple[str | int, ...], int | None]]) -> list[Place]:
    """The rows of the whole model.

    Args:
        table: of the architecture.
        layers: where the parameters of each layer lie, of `param_layout.layer_places`.

    Returns:
        One place for each part of each parameter.
    """
    places = [_place((), None, "", row) for row in table.outside]
    for i, (path, stacked) in enumerate(layers):
        places += [_place(path, stacked, f"model.layers.{i}.", row) for row in table.layer(i)]
    return places


def _place(path: tuple[str | int, ...], stacked: int | None, prefix: str, row: Row) -> Place:
    both = tuple(i for i in (stacked, row.stacked) if i is not None)
    return Place((*path, *row.parameter.split("/")), both, prefix + row.tensor, row)
