"""C for what is computed entry by entry."""

FORMULAS = {
    'Abs': 'fabsf({0})',
    'Add': '({0} + {1})',
    'Div': '({0} / {1})',
    'Equal': '({0} == {1})',
    'Erf': 'erff({0})',
    'Exp': 'expf({0})',
    'Greater': '({0} > {1})',
    'GreaterOrEqual': '({0} >= {1})',
    'LeakyRelu': 'leaky({0}, {alpha})',
    'Less': '({0} < {1})',
    'LessOrEqual': '({0} <= {1})',
    'Log': 'logf({0})',
    'Max': 'fmaxf({0}, {1})',
    'Min': 'fminf({0}, {1})',
    'Mul': '({0} * {1})',
    'Neg': '(-{0})',
    'Not': '(!{0})',
    'Pow': 'powf({0}, {1})',
    'Reciprocal': '(1 / {0})',
    'Relu': 'positive({0})',
    'Sigmoid': '(1 / (1 + expf(-{0})))',
    'Sign': '(({0} > 0) - ({0} < 0))',
    'Sqrt': 'sqrtf({0})',
    'Sub': '({0} - {1})',
    'Tanh': 'tanhf({0})',
    'Where': '({0} ? {1} : {2})',
}
HELPERS = {
    'LeakyRelu': 'static float leaky(float x, float alpha) { return x > 0 ? x : alpha * x; }',
    'Relu': 'static float positive(float x) { return x > 0 ? x : 0; }',
}
