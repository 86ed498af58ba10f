"""Which network is which, by what the entries of result.json say of method, phase and density."""

from collections.abc import Iterable

from robustprune_jax.config.parts import Part

BASELINE = 'lwm'  # the method that the others are compared with


def part_of(network: dict) -> Part:
    """Returns the part of a run that ended with a network of result.json; the name of one that no
    method made stands for the method."""
    if network['phase'] == 'pretrain':
        return Part('pretrain')
    return Part(network['phase'], network['method'] or network['name'], float(network['density']))


def titles(networks: Iterable[dict], parts: Iterable[Part] = ()) -> dict[str | None, str]:
    """Returns method -> title: None for pretraining, then LWM, then the others as they appear. A
    method of `parts` whose title no network says goes by its name."""
    found: dict[str | None, str] = {}
    for network in networks:
        found.setdefault(part_of(network).method, network['title'] or network['name'])
    for part in parts:
        found.setdefault(part.method, part.method or 'pretrained')
    return {method: found[method] for method in (None, BASELINE, *found) if method in found}


def label(part: Part, called: dict[str | None, str]) -> str:
    """Returns what a network is called where its density stands beside it."""
    return called[part.method] + ', before fine-tuning' * (part.phase == 'prune')
