"""C for what is computed entry by entry."""

FORMULAS = {
    'Abs': 'fabsf({0})',
    'Add': '({0} + {1})',
    'Div': '({0} / {1})',
    'Erf': 'erff({0})',
    'Exp': 'expf({0})',
    'LeakyRelu': 'leaky({0}, {alpha})',
    'Log': 'logf({0})',
    'Max': 'fmaxf({0}, {1})',
    'Min': 'fminf({0}, {1})',
    'Mul': '({0} * {1})',
    'Neg': '(-{0})',
    'Pow': 'powf({0}, {1})',
    'Reciprocal': '(1 / {0})',
    'Relu': 'positive({0})',
    'Sigmoid': '(1 / (1 + expf(-{0})))',
    'Sqrt': 'sqrtf({0})',
    'Sub': '({0} - {1})',
    'Tanh': 'tanhf({0})',
}
HELPERS = {
    'LeakyRelu': 'static float leaky(float x, float alpha) { return x > 0 ? x : alpha * x; }',
    'Relu': 'static float positive(float x) { return x > 0 ? x : 0; }',
}
