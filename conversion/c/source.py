"""A network's graph as one C file that multiplies with the weights that are not 0, and no others.

A convolution runs over each map as one row: an output at p is the sum of weight * input[at + p],
over the nonzero weights, whatever row p is in, with the sums in registers. What this computes
between rows is never read. Maps lie padded in the workspace, so nothing is copied for it; of
strides the input is parted into planes of equal phase first. All that is done entry by entry is
done where the layer before it writes its outputs.
"""

import math

import numpy as np

from conversion.graph import LAYERS, Graph

from .formulas import FORMULAS, HELPERS
from .plan import Map, Plan

LANES, _MOST = 8, 12  # floats of a vector; vectors of sums, of 16 registers
_PROLOGUE = """\
#include <math.h>
#include <string.h>

#if defined(__GNUC__)
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
#define LANES 8
#else
typedef float vec;
#define LANES 1
#endif

/* out[p] = sum of w[k] * x[at[k] + p], for p below length and a little more */
#define RUN(NAME, R) \\
static void NAME(const float *x, const int *at, const float *w, int n, float *out, int length) { \\
  for (int p = 0; p < length; p += R * LANES) { \\
    vec a[R]; \\
    for (int r = 0; r < R; r++) a[r] = (vec){0}; \\
    for (int k = 0; k < n; k++) { \\
      const float *q = x + at[k] + p; \\
      for (int r = 0; r < R; r++) a[r] += w[k] * *(const vec *)(q + r * LANES); \\
    } \\
    for (int r = 0; r < R; r++) *(vec *)(out + p + r * LANES) = a[r]; \\
  } \\
}
"""


def c_source(graph: Graph, name: str = 'net') -> str:
    """Returns a C99 file with one function, re-entrant and without allocation:

        void NAME_logits(const float *images, int batch, float *logits, float *workspace);

    images: float32 [batch, C, H, W] in [0, 1]; logits: [batch, K]; workspace: NAME_WORKSPACE
    floats, of any content. Raises NotImplementedError, naming it, on an operation without C.
    """
    return _Writer(graph, name).source()


def main_program(name: str = 'net') -> str:
    """Returns a main function: float32 images from standard input, a line of logits for each; with
    an argument N the milliseconds of one image, the least of N tries, on images of 0.5."""
    upper = name.upper()
    return f"""
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static float image[{upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH];
static float workspace[{upper}_WORKSPACE], logits[{upper}_CLASSES];

int main(int count, char **arguments) {{
  if (count > 1) {{
    double least = 1e9;
    for (int i = 0; i < (int)(sizeof image / sizeof *image); i++) image[i] = 0.5f;
    for (int i = 0; i < atoi(arguments[1]); i++) {{
      clock_t start = clock();
      {name}_logits(image, 1, logits, workspace);
      double taken = 1e3 * (double)(clock() - start) / CLOCKS_PER_SEC;
      if (taken < least) least = taken;
    }}
    printf("%.4f ms\\n", least);
    return 0;
  }}
  while (fread(image, sizeof image, 1, stdin) == 1) {{
    {name}_logits(image, 1, logits, workspace);
    for (int k = 0; k < {upper}_CLASSES; k++) printf(k ? " %.9g" : "%.9g", (double)logits[k]);
    printf("\\n");
  }}
  return 0;
}}
"""


class _Writer:
    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name
        self.slack = (_MOST + 1) * LANES  # runs read beyond the end
        self.plan = Plan(graph, self.slack)
        self.maps = self.plan.maps
        self.data: list[str] = []
        self.body: list[str] = []
        self.lengths: set[int] = set()
        self.scratch, self.phases = 0, 0

    def source(self) -> str:
        for root in self.plan.roots:
            self._emit(root)
        channels, height, width = self.graph.image_shape
        upper = self.name.upper()
        classes = self.maps['logits'].channels
        arena = self.plan.arena
        workspace = arena + self.phases + self.scratch
        body = (
            '\n'.join(self.body)
            .replace('@PHASES', str(arena))
            .replace('@SCRATCH', str(arena + self.phases))
        )
        runs = '\n'.join(f'RUN(run{r}, {r})' for r in sorted(self.lengths))
        ops = {node.op for node in self.graph.nodes.values()}
        helpers = '\n'.join(text for op, text in HELPERS.items() if op in ops)
        return f"""\
/* A pruned network, by robustprune_jax. Images are float32 [batch, {channels}, {height}, {width}]
   in [0, 1], logits [batch, {classes}]; the workspace may hold anything. Compile with -O3
   -march=native where you can. */
#define {upper}_CHANNELS {channels}
#define {upper}_HEIGHT {height}
#define {upper}_WIDTH {width}
#define {upper}_CLASSES {classes}
#define {upper}_WORKSPACE {workspace} /* floats */

{_PROLOGUE}{runs}
{helpers}

{chr(10).join(self.data)}

static void one(const float *images, float *logits, float *workspace) {{
{body}
}}

void {self.name}_logits(const float *images, int batch, float *logits, float *workspace) {{
  for (int i = 0; i < batch; i++)
    one(images + (long)i * {channels * height * width}, logits + (long)i * {classes}, workspace);
}}
"""

    def _array(self, kind, values):
        """The name of a constant array."""
        name = f'd{len(self.data)}'
        values = [f'{v:d}' if kind == 'int' else _literal(v) for v in np.ravel(values).tolist()]
        lines = [', '.join(values[i : i + 12]) for i in range(0, len(values), 12)]
        self.data.append(
            f'static const {kind} {name}[{max(len(values), 1)}] = {{'
            + ',\n'.join(lines or ['0'])
            + '};'
        )
        return name

    def _pointer(self, value):
        if value == 'logits':
            return 'logits'
        if value in self.plan.buffers:
            return f'(workspace + {self.plan.buffers[value].offset})'
        assert value == 'images', value
        return 'images'

    def _entry(self, value, c='c', y='y', x='x'):
        """A value's entry there."""
        return f'{self._pointer(value)}[{self.maps[value].at(c, y, x)}]'

    def _expression(self, value, layer):
        """C for the entry of a value at c, y, x; `layer`: the one whose sum is `sum`."""
        if value == layer:
            return 'sum'
        if value in self.graph.initialisers:
            array = self.graph.initialisers[value]
            if array.size == 1:
                return _literal(array.item())
            if array.size != array.shape[1]:
                raise NotImplementedError(f'no C for {value}, which differs over a map')
            return f'{self._array("float", array)}[c]'
        node = self.graph.nodes.get(value)
        if node is None or value not in self.plan.inlined:
            return self._entry(value)
        return self._formula(node, layer)

    def _formula(self, node, layer):
        parts = [self._expression(x, layer) for x in node.inputs]
        alpha = _literal(node.attributes['alpha']) if 'alpha' in node.attributes else ''
        return FORMULAS[node.op].format(*parts, alpha=alpha)

    def _emit(self, root):
        shape = self.maps[root]
        if any(shape[3:]):
            self._frame(root, shape)
        if root == 'images':
            source = Map(*self.graph.image_shape)
            text = f'images[{source.at("c", "y", "x")}]'
            self._loop(shape, self._entry(root), text)
            return
        node = self.graph.nodes[root]
        leaves = self.plan.leaves(root) if node.op in FORMULAS else [root]
        layer = next(
            (x for x in leaves if self.plan.is_layer(x) and (x == root or x in self.plan.inlined)),
            None,
        )
        if layer:
            text = 'sum' if layer == root else self._formula(node, layer)
            emit = self._convolution if self.graph.nodes[layer].op == 'Conv' else self._dense
            emit(root, layer, text)
        elif node.op in FORMULAS:
            self._loop(shape, self._entry(root), self._formula(node, None))
        elif node.op in _OTHERS:
            _OTHERS[node.op](self, root, node)
        else:
            raise NotImplementedError(
                f'no C for the operation {node.op!r}; there is for '
                f'{", ".join(sorted([*FORMULAS, *LAYERS, *_OTHERS]))}'
            )

    def _frame(self, root, shape):
        """Zeros around each channel, which the buffer's last value has written over."""
        start, end = shape.top * shape.row, shape.bottom * shape.row
        rows = shape.height * shape.row
        self.body.append(
            f'  for (int c = 0; c < {shape.channels}; c++) {{\n'
            f'    float *p = {self._pointer(root)} + c * {shape.plane};\n'
            f'    memset(p, 0, {start} * sizeof(float));\n'
            f'    memset(p + {start + rows}, 0, {end} * sizeof(float));\n'
            f'    for (int y = {shape.top}; y < {shape.top + shape.height}; y++) {{\n'
            f'      for (int x = 0; x < {shape.left}; x++) p[y * {shape.row} + x] = 0;\n'
            f'      for (int x = {shape.left + shape.width}; x < {shape.row}; x++) '
            f'p[y * {shape.row} + x] = 0;\n    }}\n  }}'
        )

    def _loop(self, shape, target, text):
        """target = text at every c, y, x of a map."""
        self.body.append(
            f'  for (int c = 0; c < {shape.channels}; c++)\n'
            f'    for (int y = 0; y < {shape.height}; y++)\n'
            f'      for (int x = 0; x < {shape.width}; x++)\n'
            f'        {target} = {text};'
        )

    def _convolution(self, root, layer, text):
        node = self.graph.nodes[layer]
        source, shape = node.inputs[0], self.maps[root]
        kernel = self.graph.initialisers[node.inputs[1]]
        bias = self.graph.initialisers[node.inputs[2]] if len(node.inputs) > 2 else None
        attributes = node.attributes
        top, left = attributes['pads'][:2]
        strides, dilations = attributes['strides'], attributes['dilations']
        per_group = len(kernel) // attributes['group']
        if max(strides) > 1:
            pointer, plane, row, planes = self._parted(source, node, shape)
        else:
            inputs = self.maps[source]
            pointer, plane, row = self._pointer(source), inputs.plane, inputs.row
            top, left = top - inputs.top, left - inputs.left  # of what lies before it
            planes = 1
        first, at, weights = [0], [], []
        for o, of_output in enumerate(kernel):
            for i, dy, dx in zip(*np.nonzero(of_output), strict=True):
                c = int(i) + o // per_group * kernel.shape[1]
                y, x = int(dy) * dilations[0], int(dx) * dilations[1]
                if max(strides) > 1:
                    phase = y % strides[0] * strides[1] + x % strides[1]
                    place = (c * planes + phase) * plane + y // strides[0] * row + x // strides[1]
                else:
                    place = c * plane + (y - top) * row + x - left
                at.append(place)
                weights.append(float(of_output[i, dy, dx]))
            first.append(len(at))
        length = (shape.height - 1) * row + shape.width
        r = _vectors(length)
        self.lengths.add(r)
        self.scratch = max(self.scratch, -(-length // (r * LANES)) * r * LANES)
        first, at, weights = (
            self._array(kind, values)
            for kind, values in (('int', first), ('int', at), ('float', weights))
        )
        offset = f' + {self._array("float", bias)}[c]' if bias is not None else ''
        self.body.append(
            f'  for (int c = 0; c < {shape.channels}; c++) {{\n'
            f'    float *sums = workspace + @SCRATCH;\n'
            f'    run{r}({pointer}, {at} + {first}[c], {weights} + {first}[c], '
            f'{first}[c + 1] - {first}[c], sums, {length});\n'
            f'    for (int y = 0; y < {shape.height}; y++)\n'
            f'      for (int x = 0; x < {shape.width}; x++) {{\n'
            f'        float sum = sums[y * {row} + x]{offset};\n'
            f'        {self._entry(root)} = {text};\n'
            f'      }}\n  }}'
        )

    def _parted(self, source, node, shape):
        """The padded input as planes of equal phase, each with the rows that the taps reach."""
        inputs = self.maps[source]
        (sy, sx), (dy, dx) = node.attributes['strides'], node.attributes['dilations']
        top, left = node.attributes['pads'][:2]
        taps = self.graph.initialisers[node.inputs[1]].shape[2:]
        height = shape.height + (taps[0] - 1) * dy // sy + 1
        row = shape.width + (taps[1] - 1) * dx // sx + 1
        plane, planes = height * row, sy * sx
        self.phases = max(self.phases, inputs.channels * planes * plane + self.slack)
        self.body.append(
            f'  for (int c = 0; c < {inputs.channels}; c++)\n'
            f'    for (int i = 0; i < {sy}; i++)\n'
            f'      for (int j = 0; j < {sx}; j++)\n'
            f'        for (int v = 0; v < {height}; v++)\n'
            f'          for (int u = 0; u < {row}; u++) {{\n'
            f'            int y = v * {sy} + i - {top}, x = u * {sx} + j - {left};\n'
            f'            int inside = y >= 0 && y < {inputs.height} && x >= 0 && '
            f'x < {inputs.width};\n'
            f'            workspace[@PHASES + ((c * {sy} + i) * {sx} + j) * {plane} + v * {row}'
            f' + u]'
            f' =\n              inside ? {self._entry(source)} : 0;\n          }}'
        )
        return '(workspace + @PHASES)', plane, row, planes

    def _dense(self, root, layer, text):
        node = self.graph.nodes[layer]
        kernel = self.graph.initialisers[node.inputs[1]]
        bias = self.graph.initialisers[node.inputs[2]] if len(node.inputs) > 2 else None
        rows, columns = np.nonzero(kernel)
        first = self._array('int', np.searchsorted(rows, np.arange(len(kernel) + 1)))
        at, weights = self._array('int', columns), self._array('float', kernel[rows, columns])
        start = f'{self._array("float", bias)}[c]' if bias is not None else '0'
        self.body.append(
            f'  for (int c = 0; c < {len(kernel)}; c++) {{\n'
            f'    int y = 0, x = 0;\n'
            f'    float sum = {start};\n'
            f'    for (int k = {first}[c]; k < {first}[c + 1]; k++)\n'
            f'      sum += {weights}[k] * {self._pointer(node.inputs[0])}[{at}[k]];\n'
            f'    {self._entry(root)} = {text};\n  }}'
        )

    def _pool(self, root, node):
        shape, source = self.maps[root], node.inputs[0]
        inputs = self.maps[source]
        (ky, kx), (sy, sx) = node.attributes['kernel_shape'], node.attributes['strides']
        top, left = node.attributes['pads'][:2]
        largest = node.op == 'MaxPool'
        start, step = ('-INFINITY', 'm = fmaxf(m, v)') if largest else ('0', 'm += v')
        result = 'm' if largest else f'm * {_literal(1 / (ky * kx))}'
        self.body.append(
            f'  for (int c = 0; c < {shape.channels}; c++)\n'
            f'    for (int y = 0; y < {shape.height}; y++)\n'
            f'      for (int x = 0; x < {shape.width}; x++) {{\n'
            f'        float m = {start};\n'
            f'        for (int b = y * {sy} - {top}; b < y * {sy} - {top} + {ky}; b++)\n'
            f'          for (int a = x * {sx} - {left}; a < x * {sx} - {left} + {kx}; a++) {{\n'
            f'            int inside = b >= 0 && b < {inputs.height} && a >= 0 && '
            f'a < {inputs.width};\n            if (!inside) continue;\n'
            f'            float v = {self._entry(source, y="b", x="a")};\n'
            f'            {step};\n          }}\n'
            f'        {self._entry(root)} = {result};\n      }}'
        )

    def _reduce(self, root, node):
        source = node.inputs[0]
        if tuple(node.attributes['axes']) != (2, 3):
            raise NotImplementedError(f'no C for {node.op} over axes {node.attributes["axes"]}')
        inputs = self.maps[source]
        largest = node.op == 'ReduceMax'
        start, step = ('-INFINITY', 'm = fmaxf(m, v)') if largest else ('0', 'm += v')
        result = 'm' if largest else f'm * {_literal(1 / (inputs.height * inputs.width))}'
        self.body.append(
            f'  for (int c = 0; c < {inputs.channels}; c++) {{\n'
            f'    float m = {start};\n'
            f'    for (int y = 0; y < {inputs.height}; y++)\n'
            f'      for (int x = 0; x < {inputs.width}; x++) {{\n'
            f'        float v = {self._entry(source)};\n        {step};\n      }}\n'
            f'    {self._entry(root, y="0", x="0")} = {result};\n  }}'
        )

    def _flatten(self, root, node):
        source = node.inputs[0]
        inputs = self.maps[source]
        place = f'c * {inputs.height * inputs.width} + y * {inputs.width} + x'
        self._loop(inputs, f'{self._pointer(root)}[{place}]', self._entry(source))

    def _concat(self, root, node):
        if node.attributes['axis'] != 1:
            raise NotImplementedError('no C for Concat but of channels')
        start = 0
        for source in node.inputs:
            inputs = self.maps[source]
            target = self._entry(root, c=f'(c + {start})')
            self._loop(inputs, target, self._entry(source))
            start += inputs.channels


_OTHERS = {
    'AveragePool': _Writer._pool,
    'Concat': _Writer._concat,
    'Flatten': _Writer._flatten,
    'MaxPool': _Writer._pool,
    'ReduceMax': _Writer._reduce,
    'ReduceMean': _Writer._reduce,
}


def _vectors(length: int) -> int:
    """How many vectors of sums take the least time for a run of this length."""

    def cost(r):
        return math.ceil(length / (r * LANES)) * (r + 1.5)

    return min(range(1, _MOST + 1), key=cost)


def _literal(value: float) -> str:
    text = f'{np.float32(value):.9g}'
    return f'{text}f' if any(mark in text for mark in '.en') else f'{text}.0f'
