"""The first convolution of the int8 graph for a CPU, laid out for ONNX Runtime's kernels.

These multiply four bytes at a time, four channels of one pixel, and look up where each pixel of a window lies. Of an
image with one channel that uses a quarter, 49 times a window: the first convolution, 2% of the network's
arithmetic, took 11% of its time where a processor has VNNI. Four neighbours of a row do as well as four channels, and
no byte moves for it: `(n, 1, S, S)` is `(n, S, S / 4, 4)`. Two results of a stride of 2 then share a window, as twice
as many channels: 64 filters of 7 x 7 become 128 of 7 x 3 x 4, part of whose weights are 0. The sums of integers are the
same, and so is every bit of the keypoints.

And its weights are rounded by what it sees. Grey levels are never under 0 and much alike from pixel to pixel: of
such, a filter of weights each rounded to the nearest shows errors that all later layers build on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["fold_first_convolution", "remove_unused", "round_first_convolution", "unfold_first_convolution"]

_PREFIX = "kp_fold_"
"""Of the names of what folding adds."""
_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def round_first_convolution(model: Any, fp32: Any, crops: NDArray[np.uint8]) -> bool:
    """Rounds the first convolution's weights anew, in place: each so that those after it make up for its error.

    On the same scales, one weight after the other, each time with the least squared error of the filters' sums over
    windows of the crops that the weights after it can still reach, as GPTQ does (Frantar et al. 2023, algorithm 1).

    Args:
        model: the network with Q/DQ nodes, `onnx.ModelProto`, not yet folded.
        fp32: the network that it was made of.
        crops: `(n, 1, size, size)` uint8.

    Returns:
        Whether it was done: not where the first convolution is in float32, or the crops show it nothing.
    """
    first, exact = _First(model), _First(fp32)
    if first.before is None:
        return False
    weights = exact.weights
    height, width = weights.shape[2:]
    side = first.side(model)
    if side < max(height, width):  # no filter lies in the image
        return False
    step = crops.shape[-1] // side  # a reduced network sees means of so many pixels
    means = crops.reshape(-1, 1, side, step, side, step).mean(axis=(3, 5)) if step > 1 else crops
    windows = np.lib.stride_tricks.sliding_window_view(means[:, 0], (height, width), axis=(1, 2))[:, ::5, ::5]
    seen = windows.reshape(-1, height * width).astype(np.float64)
    moment = seen.T @ seen / len(seen)
    if not moment.any():  # all is black
        return False
    moment += 0.01 * moment.diagonal().mean() * np.eye(len(moment))
    passed_on = np.linalg.cholesky(np.linalg.inv(moment)).T
    left = weights.reshape(len(weights), -1) / first.scales[:, None].astype(np.float64)
    most = np.abs(first.weights).max()
    rounded = np.empty(left.shape, np.int8)
    for i, row in enumerate(passed_on):
        rounded[:, i] = np.rint(left[:, i]).clip(-most, most)
        left -= ((left[:, i] - rounded[:, i]) / row[i])[:, None] * row
    first.set_weights(rounded.reshape(weights.shape))
    return True


def fold_first_convolution(model: Any) -> bool:
    """Folds four pixels of a row into channels, in place.

    Where quantising the input gives the grey levels back, as a scale of 1/255 does, the graph reads those instead.

    Args:
        model: the network with Q/DQ nodes, `onnx.ModelProto`.

    Returns:
        Whether it was done: not where the first convolution is in float32, or 4 does not divide the image's side.
    """
    first = _First(model)
    if first.before is None:
        return False
    side = first.side(model)
    if side % 4:
        return False
    weights = first.weights[:, 0]
    filters = len(weights)
    # of a row's 12 pixels, from the group before on: the first result's taps are 1 to 7, the second's 3 to 9
    wide = np.zeros((2, filters, 7, 12), weights.dtype)
    wide[0, :, :, 1:8] = wide[1, :, :, 3:10] = weights
    first.reshape(wide.reshape(2 * filters, 7, 3, 4).transpose(0, 3, 1, 2), strides=[2, 1], pads=[3, 1, 3, 1])
    image = first.grey_levels() or first.before.input[0]
    first.view("in", image, first.before, [(-1, side, side // 4, 4), _NCHW])
    first.view("out", first.behind.input[0], first.behind, [_NHWC, (-1, side // 2, side // 2, filters), _NCHW])
    remove_unused(model.graph)
    return True


def unfold_first_convolution(model: Any) -> bool:
    """Undoes `fold_first_convolution`, in place, for engines that are faster without; what read the image stays out.

    Returns:
        Whether the graph was folded.
    """
    views = [node for node in model.graph.node if node.name.startswith(_PREFIX)]
    if not views:
        return False
    first = _First(model)
    wide = first.weights
    rows = wide[: len(wide) // 2].transpose(0, 2, 3, 1).reshape(-1, 7, 12)
    first.reshape(rows[:, None, :, 1:8], strides=[2, 2], pads=[3, 3, 3, 3])
    inputs = {node.output[0]: node.input[0] for node in views}
    for reader in (first.before, first.behind):
        assert reader is not None  # it was folded
        while reader.input[0] in inputs:
            reader.input[0] = inputs[reader.input[0]]
    remove_unused(model.graph)
    return True


def remove_unused(graph: Any) -> None:
    """Takes away the nodes and constants that nothing reads."""
    wanted = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if wanted.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            wanted.update(node.input)
    for constant in [c for c in graph.initializer if c.name not in wanted]:
        graph.initializer.remove(constant)
    del graph.value_info[:]  # some tensors have other shapes now, or are gone


class _First:
    """The first convolution of a graph.

    Attributes:
        before: the node that dequantises its image; None where it is in float32.
        behind: the one that dequantises its result, for the next layer.
    """

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._constants = {constant.name: constant for constant in self._graph.initializer}
        self._makers = {name: node for node in self._graph.node for name in node.output}
        self._conv = next(node for node in self._graph.node if node.op_type == "Conv")
        before = self._makers.get(self._conv.input[0])
        self.before = before if before is not None and before.op_type == "DequantizeLinear" else None
        if self.before is not None:
            behind = self._conv
            while behind.op_type != "DequantizeLinear":
                behind = next(node for node in self._graph.node if behind.output[0] in node.input)
            self.behind = behind

    def side(self, model: Any) -> int:
        """Of the image that it sees, where that is quantised."""
        assert self.before is not None
        shapes = {info.name: info for info in onnx.shape_inference.infer_shapes(model).graph.value_info}
        side: int = shapes[self.before.output[0]].type.tensor_type.shape.dim[2].dim_value
        return side

    @property
    def weights(self) -> NDArray[Any]:
        """`(filters, channels, height, width)`, int8 where they are quantised."""
        return self._constant(self._of_weights.input[0] if self._of_weights else self._conv.input[1])

    @property
    def scales(self) -> NDArray[np.float32]:
        """`(filters,)`, of quantised weights."""
        assert self._of_weights is not None
        return self._constant(self._of_weights.input[1])

    def set_weights(self, weights: NDArray[np.int8]) -> None:
        """Gives it other quantised weights of the same shape."""
        assert self._of_weights is not None
        self._set_constant(self._of_weights.input[0], weights)

    @property
    def _of_weights(self) -> Any:
        """The node that dequantises the weights; None where they are not quantised."""
        return self._makers.get(self._conv.input[1])

    def reshape(self, weights: NDArray[np.int8], strides: list[int], pads: list[int]) -> None:
        """Gives it other filters, and as many scales and biases: the first ones, as often as it takes."""
        of_weights, of_bias = (self._makers[name] for name in self._conv.input[1:])
        self._set_constant(of_weights.input[0], weights)
        for name in (*of_weights.input[1:], *of_bias.input):
            self._set_constant(name, np.resize(self._constant(name), len(weights)))
        changed = {"kernel_shape": list(weights.shape[2:]), "strides": strides, "pads": pads}
        kept = [attribute for attribute in self._conv.attribute if attribute.name not in changed]
        del self._conv.attribute[:]
        self._conv.attribute.extend(kept + [helper.make_attribute(name, value) for name, value in changed.items()])

    def grey_levels(self) -> str | None:
        """The name of the graph's uint8 input, where quantising the image makes just that of it."""
        assert self.before is not None
        chain = [self._makers[self.before.input[0]]]
        while chain[-1].input[0] in self._makers:
            chain.append(self._makers[chain[-1].input[0]])
        if [node.op_type for node in chain] != ["QuantizeLinear", "Div", "Cast"]:
            return None
        quantise, divide, cast = chain
        levels = np.arange(256, dtype=np.float32)
        scale, zero = (self._constant(name) for name in quantise.input[1:])
        back = np.rint(levels / self._constant(divide.input[1]) / scale) + zero
        return cast.input[0] if np.array_equal(back, levels) else None

    def view(self, name: str, tensor: str, reader: Any, steps: Sequence[tuple[int, ...]]) -> None:
        """Lets a node read a tensor in another view: each step is a new shape, or an order of the axes."""
        nodes = []
        for i, step in enumerate(steps):
            made = f"{_PREFIX}{name}_{i}"
            if step in (_NHWC, _NCHW):
                nodes.append(helper.make_node("Transpose", [tensor], [made], name=made, perm=step))
            else:
                self._graph.initializer.append(numpy_helper.from_array(np.array(step, np.int64), f"{made}_shape"))
                nodes.append(helper.make_node("Reshape", [tensor, f"{made}_shape"], [made], name=made))
            tensor = made
        reader.input[0] = tensor
        place = list(self._graph.node).index(reader)
        for node in reversed(nodes):
            self._graph.node.insert(place, node)

    def _constant(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self._constants[name])  # type: ignore[no-any-return]

    def _set_constant(self, name: str, value: NDArray[Any]) -> None:
        self._constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
