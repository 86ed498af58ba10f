"""Which weights lie on a path of kept weights from the image to a logit."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import JaxprEqn

from robustprune_jax.graph.interpret import (
    MOVES,
    PRODUCTS,
    computed,
    goes_by_entry,
    interpret,
    moved,
    place,
)

# Add entries: they are reached as by moves.
_ADDS = ('cumsum', 'reduce_sum', 'reduce_window_sum')


class Reach(NamedTuple):
    """For each entry of a value whether the image reaches it: 1 or 0."""

    entries: jax.Array


def live_weights(
    module: linen.Module, variables: dict, image_shape: tuple[int, ...]
) -> tuple[dict, jax.Array]:
    """Returns which kept weights carry the image to a logit, as masks are: 1 on a path of kept
    weights between them, else 0; and which classes the image reaches, bool [K].

    image_shape: (H, W, C). Paths are the network's wiring: weights that cancel are not looked for,
    nor biases, by which a weight off all paths may still add a constant.
    Raises NotImplementedError, with the line of the model, on an operation whose wiring is unknown.
    """
    network = {name: variables[name] for name in ('params', 'batch_stats') if name in variables}
    network['params'] = jax.tree.map(jnp.ones_like, network['params'])
    return _live(module, network, variables['masks'], tuple(image_shape))


def dead_ends(module: linen.Module, variables: dict, image_shape: tuple[int, ...]) -> list[str]:
    """Returns a sentence on each class that the image does not reach, and on each layer whose kept
    weights all lie on no path; [] where the wiring is unknown."""
    try:
        live, classes = live_weights(module, variables, image_shape)
    except NotImplementedError:
        return []
    sentences = []
    if cut_off := [str(label) for label in range(len(classes)) if not classes[label]]:
        sentences.append(f'no path of kept weights leads to the classes {", ".join(cut_off)}')
    kept = flatten_dict(variables['masks'])
    for path, mask in flatten_dict(live).items():
        if not mask.any():
            count, layer = int(kept[path].sum()), '/'.join(path[:-1])
            sentences.append(f'none of the {count} kept weights of {layer} lies on a path')
    return sentences


@partial(jax.jit, static_argnums=(0, 3))
def _live(module, network, masks, image_shape):
    images = jnp.ones((1, *image_shape))
    program = jax.make_jaxpr(partial(module.apply, train=False))(network, images)
    params = flatten_dict(network['params'])

    def reached(masks):
        wired = unflatten_dict({**params, **flatten_dict(masks)})
        args = jax.tree.leaves({**network, 'params': wired})
        (logits,) = interpret(program, [*args, Reach(images)], _rule)
        return jnp.sum(logits.entries), logits.entries[0] > 0

    paths, classes = jax.grad(reached, has_aux=True)(masks)
    return jax.tree.map(lambda mask, count: mask * (count > 0), masks, paths), classes


@jax.custom_vjp
def _any(counts):
    """1 where a count is above 0; and back, 1 where anything is reached."""
    return (counts > 0).astype(jnp.float32)


_any.defvjp(lambda counts: (_any(counts), None), lambda _, g: ((g > 0).astype(jnp.float32),))


def _rule(eqn: JaxprEqn, inputs: list, nested: tuple[JaxprEqn, ...]) -> list:
    name = eqn.primitive.name
    if not any(isinstance(x, Reach) for x in inputs):
        return computed(eqn, inputs)
    reaching = [x.entries for x in inputs if isinstance(x, Reach)]
    shape = eqn.outvars[0].aval.shape
    if name in MOVES or name in _ADDS:
        outputs = moved(eqn, inputs, Reach, 0)
    elif name in PRODUCTS:
        values = [x.entries if isinstance(x, Reach) else jnp.abs(x) for x in inputs]
        outputs = computed(eqn, values, preferred_element_type=None)
    elif name == 'reduce_window_max':
        outputs = [jax.lax.reduce_window_sum_p.bind(reaching[0], **eqn.params)]
    elif name.startswith('reduce_') and 'axes' in eqn.params:
        outputs = [jnp.sum(reaching[0], axis=eqn.params['axes'])]
    elif goes_by_entry(eqn, reaching):
        outputs = [sum(reaching) + jnp.zeros(shape)]
    else:
        raise NotImplementedError(f'no wiring for the primitive {name!r}, at {place(nested)}')
    return [Reach(_any(x)) for x in outputs]
