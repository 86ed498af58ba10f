"""Networks from outside JAX as logits functions, and adversarial images as files."""

import io
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.runtime.files import write_atomically


def from_callable(
    scores: Callable[[np.ndarray], np.ndarray],
    vjp: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Callable[[jax.Array], jax.Array]:
    """Returns a logits function that asks `scores`: float32 images [B, H, W, C] -> logits [B, K].

    vjp: (images, cotangents [B, K]) -> gradient by the images, [B, H, W, C]; without one only
    attacks=('square',) apply, and another raises ValueError. The number of classes is that of the
    scores of a black image.
    """

    def host(function, shape, *args):
        def call(*args):
            return np.asarray(function(*map(np.asarray, args)), np.float32)

        return jax.pure_callback(call, jax.ShapeDtypeStruct(shape, jnp.float32), *args)

    @jax.custom_vjp
    def logits_fn(images):
        black = np.zeros((1, *images.shape[1:]), np.float32)
        return host(scores, (len(images), np.shape(scores(black))[-1]), images)

    def backward(images, cotangents):
        if vjp is None:
            raise ValueError("this callable has no gradient: choose attacks=('square',)")
        return (host(vjp, images.shape, images, cotangents),)

    logits_fn.defvjp(lambda images: (logits_fn(images), images), backward)
    return logits_fn


def from_torch(module) -> Callable[[jax.Array], jax.Array]:
    """Returns a logits function of a torch.nn.Module on [B, C, H, W] images, with its gradients.

    The module stays where it is, on its device, and should be in eval mode.
    """
    import torch

    def tensor(images):
        parameter = next(module.parameters(), torch.zeros(()))
        return torch.tensor(images.transpose(0, 3, 1, 2), device=parameter.device)

    def scores(images):
        with torch.no_grad():
            return module(tensor(images)).cpu().numpy()

    def vjp(images, cotangents):
        x = tensor(images).requires_grad_()
        logits = module(x)
        (gradient,) = torch.autograd.grad(logits, x, torch.tensor(cotangents, device=x.device))
        return gradient.cpu().numpy().transpose(0, 2, 3, 1)

    return from_callable(scores, vjp)


def save(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    adversarial: np.ndarray,
    broken_by: np.ndarray,
) -> None:
    """Writes what `in_order` took and gave as a .npz that any tool reads without this project.

    Arrays: images and adversarial float32 [N, H, W, C] in [0, 1], labels int64 [N] and broken_by
    str [N], an attack's name, 'clean', or '' where the image stands.
    """
    contents = io.BytesIO()
    np.savez_compressed(
        contents,
        images=np.asarray(images, np.float32),
        labels=np.asarray(labels, np.int64),
        adversarial=np.asarray(adversarial, np.float32),
        broken_by=np.asarray(broken_by, str),
    )
    write_atomically(path, contents.getvalue())
