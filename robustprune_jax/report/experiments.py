"""Runs sorted into experiments: one recipe, a run for each seed."""

from functools import reduce
from pathlib import PurePath
from typing import NamedTuple

from robustprune_jax.report.networks import titles
from robustprune_jax.report.run import Run
from robustprune_jax.runtime.files import differences


class Experiment(NamedTuple):
    """Runs of one recipe, each with a seed of its own; title: what tells it from the others."""

    title: str
    runs: list[Run]

    @property
    def results(self) -> list[dict]:
        """What the result.json of each run holds."""
        return [run.result for run in self.runs]

    @property
    def titles(self) -> dict[str | None, str]:
        """Method -> title: None for pretraining, then LWM, then the others as they appear."""
        every = [network for result in self.results for network in result['networks']]
        return titles(every, [part for run in self.runs for part in run.parts])

    @property
    def densities(self) -> list[float]:
        """The densities of which there are other files than result.json, densest first."""
        return sorted(
            {part.density for run in self.runs for part in run.parts if part.density}, reverse=True
        )


def experiments(runs: list[Run]) -> tuple[list[Experiment], list[str]]:
    """Returns the experiments that `runs` belong to, and sentences on what was found.

    Runs whose recipes agree are one experiment; those of one seed are parts of one run, made on
    different machines, of which an earlier one has precedence. The sentences are the notes of the
    runs, and which parts were joined.
    """
    several = len(runs) > 1
    notes = [f'{f"{run.workdir}/" if several else ""}{note}' for run in runs for note in run.notes]
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if run.recipe and g[0].recipe == run.recipe), None)
        if group is None:
            groups.append([run])
            continue
        seed = run.result.get('seed')
        same = [i for i, other in enumerate(group) if other.result.get('seed') == seed]
        if same:
            group[same[0]] = _joined(group[same[0]], run, notes)
        else:
            group.append(run)
    return [Experiment(_title(g, groups), g) for g in groups], notes


def fields_apart(found: list[Experiment]) -> dict[str, list]:
    """Returns the fields in which recipes differ, with the value of each experiment."""
    recipes = [experiment.runs[0].recipe for experiment in found]
    known = [recipe for recipe in recipes if recipe]
    fields = {x.partition(': ')[0] for other in known for x in differences(known[0], other)}
    return {field: [_value(recipe, field) for recipe in recipes] for field in sorted(fields)}


def facts(run: Run) -> dict[str, str]:
    """Returns architecture, data and objective of a run, '' where its files do not say them."""
    known = {**run.result, **(run.recipe or {})}
    data = known.get('dataset')
    if isinstance(data, dict):
        folder = PurePath(data['dir']).name
        data = f'{folder} ({data["name"]})' if folder else data['name']
    values = {'Architecture': known.get('arch'), 'Data': data, 'Objective': known.get('objective')}
    return {name: str(value or '') for name, value in values.items()}


def _joined(one: Run, other: Run, notes: list[str]) -> Run:
    """Returns both parts of a run as one."""
    found = {network['name']: network for network in one.result['networks']}
    for network in other.result['networks']:
        if found.setdefault(network['name'], network) != network:
            notes.append(
                f'{other.workdir}: its {network["name"]} differs from that of {one.workdir}, same '
                'recipe and seed; left out'
            )
    notes.append(
        f'{other.workdir}: part of the run in {one.workdir}, same recipe and seed '
        f'{one.result.get("seed")}: reported as one'
    )
    times = [run.result.get('seconds') for run in (one, other)]
    seconds = sum(time for time in times if isinstance(time, int | float))
    result = {**other.result, **one.result, 'seconds': seconds, 'networks': list(found.values())}
    return one._replace(
        result=result,
        metrics={**other.metrics, **one.metrics},
        weights={**other.weights, **one.weights},
        radii={**other.radii, **one.radii},
        distances={**other.distances, **one.distances},
    )


def _title(group: list[Run], groups: list[list[Run]]) -> str:
    """Returns architecture, data and objective, and the folder where that is not one of a kind;
    '' for the only experiment."""
    if len(groups) == 1:
        return ''
    same = [g for g in groups if facts(g[0]) == facts(group[0])]
    folder = [f'in {group[0].workdir}'] if len(same) > 1 else []
    return ', '.join([*filter(None, facts(group[0]).values()), *folder])


def _value(recipe: dict | None, field: str):
    return reduce(lambda part, key: (part or {}).get(key), field.split('.'), recipe)
