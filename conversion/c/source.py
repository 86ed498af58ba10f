"""A network's graph as one C file that multiplies with the weights that are not 0, and no others.

All that is done entry by entry is done where the layer before it writes its outputs.
"""

from typing import NamedTuple

from conversion.graph import LAYERS, Graph

from .formulas import FORMULAS, HELPERS
from .layers import convolution, dense
from .moves import MOVES
from .plan import Map
from .writer import Writer

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
"""
_RUN = """
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
_DOT = """
static float dot(const float *a, const float *b, int n) {
  vec sums[4] = {{0}};
  float sum = 0;
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int r = 0; r < 4; r++)
      sums[r] += *(const vec *)(a + i + r * LANES) * *(const vec *)(b + i + r * LANES);
  for (; i < n; i++) sum += a[i] * b[i];
  for (int r = 0; r < 4 * LANES; r++) sum += ((const float *)sums)[r];
  return sum;
}
"""


# Of so many weights the text takes gcc 10 seconds and more.
SEPARATE = 100_000
# Of a dense layer of 784 inputs, the product with all is faster from 0.12 on, 1.7 times at 0.2, and
# 1.7 times as large there.
DENSE_ABOVE = 0.2


class Source(NamedTuple):
    """text: the C file; data: the constants, where they are a file of their own; sizes: C, H, W of
    an image, the number of classes, and the floats of a workspace."""

    text: str
    data: bytes
    image_shape: tuple[int, int, int]
    classes: int
    workspace: int


def c_source(
    graph: Graph, name: str = 'net', separate: bool = False, dense_above: float = DENSE_ABOVE
) -> Source:
    """Returns a C99 file with one function, re-entrant and without allocation:

        void NAME_logits(const float *images, int batch, float *logits, float *workspace);

    images: float32 [batch, C, H, W] in [0, 1]; logits: [batch, K]; workspace: NAME_WORKSPACE
    floats, of any content. separate: the constants are not in the text, which large networks make
    slow to compile: before the first call NAME_data must point to `data` in memory, little-endian
    numbers of four bytes, at a multiple of four. dense_above: the fraction of nonzero weights above
    which a dense layer multiplies with all of them, zeros too. Raises NotImplementedError, naming
    it, on an operation without C.
    """
    writer = Writer(graph, name, separate, dense_above)
    for root in writer.plan.roots:
        _emit(writer, root)
    channels, height, width = graph.image_shape
    upper, classes, arena = name.upper(), writer.maps['logits'].channels, writer.plan.arena
    workspace = arena + writer.phases + writer.scratch
    body = '\n'.join(writer.body)
    body = body.replace('@PHASES', str(arena)).replace('@SCRATCH', str(arena + writer.phases))
    runs = [f'RUN(run{r}, {r})' for r in sorted(writer.runs)]
    ops = {node.op for node in graph.nodes.values()}
    helpers = [text for op, text in HELPERS.items() if op in ops]
    parts = [
        f"""\
/* A pruned network, by robustprune_jax. Images are float32 [batch, {channels}, {height}, {width}]
   in [0, 1], logits [batch, {classes}]; the workspace may hold anything. Compile with -O3
   -march=native where you can. */
#define {upper}_CHANNELS {channels}
#define {upper}_HEIGHT {height}
#define {upper}_WIDTH {width}
#define {upper}_CLASSES {classes}
#define {upper}_WORKSPACE {workspace} /* floats */
{f'#define {upper}_DATA {len(writer.binary)} /* bytes */' if separate else ''}

{_PROLOGUE}""",
        _RUN if runs else '',
        *runs,
        _DOT if 'dot(' in body else '',
        *helpers,
        f'/* the content of the file of constants */\nconst char *{name}_data;' if separate else '',
        *writer.data,
        f"""
static void one(const float *images, float *logits, float *workspace) {{
{body}
}}

void {name}_logits(const float *images, int batch, float *logits, float *workspace) {{
  for (int i = 0; i < batch; i++)
    one(images + (long)i * {channels * height * width}, logits + (long)i * {classes}, workspace);
}}
""",
    ]
    text = '\n'.join(filter(None, parts))
    return Source(text, bytes(writer.binary), tuple(graph.image_shape), classes, workspace)


def _emit(writer: Writer, root: str) -> None:
    """Adds the loops that compute a value which is written down."""
    shape, graph = writer.maps[root], writer.graph
    if any(shape[3:]):
        _frame(writer, root, shape)
    if root == 'images':
        source = Map(*graph.image_shape)
        writer.loop(shape, writer.entry(root), f'images[{source.at("c", "y", "x")}]')
        return
    node, plan = graph.nodes[root], writer.plan
    leaves = plan.leaves(root) if node.op in FORMULAS else [root]
    layer = next((x for x in leaves if plan.is_layer(x) and (x == root or x in plan.inlined)), None)
    if layer:
        text = 'sum' if layer == root else writer.formula(root, layer)
        emit = convolution if graph.nodes[layer].op == 'Conv' else dense
        emit(writer, root, layer, text)
    elif node.op in FORMULAS:
        writer.loop(shape, writer.entry(root), writer.formula(root, None))
    elif node.op in MOVES:
        MOVES[node.op](writer, root, node)
    else:
        known = ', '.join(sorted([*FORMULAS, *LAYERS, *MOVES]))
        raise NotImplementedError(f'no C for the operation {node.op!r}; there is for {known}')


def _frame(writer, root, shape):
    """Zeros around each channel, which the buffer's last value has written over."""
    start, end = shape.top * shape.row, shape.bottom * shape.row
    rows = shape.height * shape.row
    writer.body.append(
        f'  for (int c = 0; c < {shape.channels}; c++) {{\n'
        f'    float *p = {writer.pointer(root)} + c * {shape.plane};\n'
        f'    memset(p, 0, {start} * sizeof(float));\n'
        f'    memset(p + {start + rows}, 0, {end} * sizeof(float));\n'
        f'    for (int y = {shape.top}; y < {shape.top + shape.height}; y++) {{\n'
        f'      for (int x = 0; x < {shape.left}; x++) p[y * {shape.row} + x] = 0;\n'
        f'      for (int x = {shape.left + shape.width}; x < {shape.row}; x++) '
        f'p[y * {shape.row} + x] = 0;\n    }}\n  }}'
    )
