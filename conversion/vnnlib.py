"""VNN-LIB properties (version 1.0), as the verifiers of VNN-COMP read them.

A property describes what must not happen: inputs X_0, X_1, ... in a box, and outputs Y_0, Y_1, ...
that are wrong there. Entries are numbered in the flat order of the ONNX file's input.
"""

import itertools
import math
import os
import re
from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax.runtime import inputs

_DIGITS = 9  # read as float32, such a number is the float32 that it was rounded from
_TOKEN = re.compile(r'[()]|[^\s()]+')
_NAME = re.compile(r'[XY]_\d{1,9}')
_NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d\d?)?')


def to_vnnlib(
    image: np.ndarray,
    label: int,
    *,
    eps: float | Fraction,
    clip: tuple[float, float] = (0.0, 1.0),
    num_classes: int,
) -> str:
    """Returns the property that an image of the l_inf ball has a logit as large as its label's.

    image: [H, W, C]; eps in pixel units, as exact as it is given, so Fraction(2, 255); the ball is
    cut to `clip`. X_i are in the order [C, H, W] of conversion.to_onnx. The box contains the ball:
    lower bounds are rounded down and upper ones up, to float32 and then to 9 digits, which is less
    than two steps of float32. Raises ValueError where the image, label or eps is not valid.
    """
    inputs.check(image[None], np.array([label]), eps=float(eps), box=clip)
    inputs.check_classes(np.array([label]), num_classes)
    least, most, eps = Fraction(clip[0]), Fraction(clip[1]), Fraction(eps)
    pixels = [Fraction(x) for x in np.asarray(image).transpose(2, 0, 1).ravel().tolist()]
    lines = [f'; Unsafe: another logit is at least as large as that of the label, {label}.']
    lines += [f'(declare-const X_{i} Real)' for i in range(len(pixels))]
    lines += [f'(declare-const Y_{j} Real)' for j in range(num_classes)]
    for i, x in enumerate(pixels):
        lines.append(f'(assert (>= X_{i} {_decimal(max(x - eps, least), -math.inf)}))')
        lines.append(f'(assert (<= X_{i} {_decimal(min(x + eps, most), math.inf)}))')
    others = [f'    (and (>= Y_{j} Y_{label}))' for j in range(num_classes) if j != label]
    return '\n'.join([*lines, '(assert (or', *others, '))', ''])


def _decimal(exact: Fraction, towards: float) -> str:
    rounding = ROUND_CEILING if towards > 0 else ROUND_FLOOR
    value = float(_rounded(exact, towards, np.float32))
    return f'{Context(prec=_DIGITS, rounding=rounding).create_decimal(value):f}'


def _rounded(exact: Fraction, towards: float, dtype=np.float64):
    """The number of this type that is next to `exact` in the direction of -inf or inf."""
    value = dtype(float(exact))
    wrong = Fraction(float(value)) < exact if towards > 0 else Fraction(float(value)) > exact
    return np.nextafter(value, dtype(towards)) if wrong else value


class Region(NamedTuple):
    """What must not happen in one box: x in [lower, upper], both [N], with outputs y for which
    rows @ y <= limits holds in all rows of a pair (rows [S, K], limits [S]) of `unsafe`."""

    lower: np.ndarray
    upper: np.ndarray
    unsafe: list[tuple[np.ndarray, np.ndarray]]


def read_vnnlib(path: str | os.PathLike) -> list[Region]:
    """Returns the regions of a property, float64: it is unsafe in at least one of them, or holds.

    Reads <= and >= between linear terms of either outputs or one input, under `and` and `or` of any
    depth. Bounds and limits are rounded outward. Raises ValueError, naming the line, for anything
    else, and where an input has no bounds.
    """
    try:
        return _regions(*_asserted(_parsed(Path(path).read_text())))
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from None


class _Form(NamedTuple):
    line: int
    parts: list

    def fail(self, what):
        raise ValueError(f'line {self.line}: {what}')


class _Atom(NamedTuple):
    """The sum of the terms, name -> factor, '' for the constant, is at most 0."""

    form: _Form
    terms: dict[str, Fraction]


def _parsed(text: str) -> list[_Form]:
    open_ = [_Form(1, [])]
    for number, line in enumerate(text.splitlines(), start=1):
        for token in _TOKEN.findall(line.partition(';')[0]):
            if token == '(':
                form = _Form(number, [])
                open_[-1].parts.append(form)
                open_.append(form)
            elif token != ')':
                open_[-1].parts.append(token)
            elif len(open_) > 1:
                open_.pop()
            else:
                raise ValueError(f'line {number}: a ) that closes nothing')
    if len(open_) > 1:
        open_[-1].fail('a ( that is not closed')
    return open_[0].parts


def _asserted(forms: list[_Form]) -> tuple[dict[str, int], list[list[list[_Atom]]]]:
    """How many inputs X and outputs Y there are, and the cases of each assertion."""
    counts, asserted = {'X': 0, 'Y': 0}, []
    for form in forms:
        match form:
            case _Form(_, ['declare-const', str(name), 'Real']) if name in (
                f'{kind}_{count}' for kind, count in counts.items()
            ):
                counts[name[0]] += 1
            case _Form(_, ['assert', _Form() as inner]):
                asserted.append(_cases(inner))
            case _Form():
                form.fail('expected (declare-const X_0 Real), X_1 ... in order, or (assert (...))')
            case _:
                raise ValueError(f'{form!r} is outside of all ()')
    if not all(counts.values()):
        raise ValueError('expected inputs X_0 ... and outputs Y_0 ... to be declared')
    return counts, asserted


def _regions(counts: dict[str, int], asserted: list[list[list[_Atom]]]) -> list[Region]:
    everywhere = [atom for cases in asserted if len(cases) == 1 for atom in cases[0]]
    choices = [cases for cases in asserted if len(cases) > 1]
    space = np.full(counts['X'], -np.inf), np.full(counts['X'], np.inf), [], []
    common, found = _constrained(everywhere, *space, counts['Y']), {}
    for choice in itertools.product(*choices):
        atoms = itertools.chain.from_iterable(choice)
        lower, upper, rows, limits = _constrained(atoms, *common, counts['Y'])
        if (free := np.isinf(lower) | np.isinf(upper)).any():
            raise ValueError(f'X_{free.argmax()} has no upper or no lower bound')
        if not rows:
            raise ValueError('nothing is asserted of the outputs')
        if (lower <= upper).all():  # else the case is none
            region = Region(lower, upper, [])
            region = found.setdefault((lower.tobytes(), upper.tobytes()), region)
            region.unsafe.append((np.array(rows), np.array(limits)))
    return list(found.values())


def _cases(form: _Form) -> list[list[_Atom]]:
    """The cases, each a list of what holds in it together."""
    match form:
        case _Form(_, ['or' | 'and' as op, *parts]) if parts and all(
            isinstance(part, _Form) for part in parts
        ):
            cases = [_cases(part) for part in parts]
            if op == 'or':
                return list(itertools.chain.from_iterable(cases))
            joined = itertools.product(*cases)
            return [list(itertools.chain.from_iterable(case)) for case in joined]
        case _Form(_, ['<=' | '>=' as op, left, right]):
            low, high = (left, right) if op == '<=' else (right, left)
            return [[_Atom(form, _plus(_terms(low, form), _terms(high, form), -1))]]
    return form.fail('expected (and (...) ...), (or (...) ...), (<= a b) or (>= a b)')


def _terms(part: str | _Form, form: _Form) -> dict[str, Fraction]:
    """A linear term: name -> factor, '' for the constant."""
    match part:
        case str() if _NAME.fullmatch(part):
            return {part: Fraction(1)}
        case str() if _NUMBER.fullmatch(part):
            return {'': Fraction(part)}
        case _Form(_, ['-', one]):
            return _plus({}, _terms(one, part), -1)
        case _Form(_, ['+' | '-' as op, first, *rest]):
            total = _terms(first, part)
            for one in rest:
                total = _plus(total, _terms(one, part), 1 if op == '+' else -1)
            return total
        case _Form(_, ['*', one, other]):
            one, other = _terms(one, part), _terms(other, part)
            for factor, scaled in ((one, other), (other, one)):
                if factor.keys() <= {''}:
                    return _plus({}, scaled, factor.get('', 0))
    return form.fail(f'{part if isinstance(part, str) else "this"} is no number or linear term')


def _plus(terms: dict, others: dict, factor: Fraction | int) -> dict:
    total = {k: terms.get(k, 0) + factor * others.get(k, 0) for k in terms | others}
    return {k: value for k, value in total.items() if value}


def _constrained(atoms: Iterable[_Atom], lower, upper, rows, limits, outputs: int):
    """The box and the constraints of outputs, with those of the atoms."""
    lower, upper, rows, limits = lower.copy(), upper.copy(), [*rows], [*limits]
    for form, terms in atoms:
        factors = {(k[0], int(k[2:])): value for k, value in terms.items() if k}
        for kind, index in factors:
            if index >= (len(lower) if kind == 'X' else outputs):
                form.fail(f'{kind}_{index} is not declared')
        constant = terms.get('', Fraction(0))
        match [*factors.items()]:
            case [(('X', i), factor)] if factor > 0:
                upper[i] = min(upper[i], _rounded(-constant / factor, math.inf))
            case [(('X', i), factor)]:
                lower[i] = max(lower[i], _rounded(-constant / factor, -math.inf))
            case several if {kind for (kind, _), _ in several} == {'Y'}:
                row = np.zeros(outputs)
                row[[j for _, j in factors]] = [float(factor) for factor in factors.values()]
                rows.append(row)
                limits.append(_rounded(-constant, math.inf))
            case _:
                form.fail('expected the bound of one input, or a constraint of outputs alone')
    return lower, upper, rows, limits
