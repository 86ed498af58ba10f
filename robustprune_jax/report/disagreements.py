"""Where attacks say different things of the same images and the same ball."""

ENSEMBLES = ('standard', 'fast')
# attack -> what it may leave more than an ensemble, as a part of the images, and what more means
FLATTERS = {
    'pgd': (0.05, 'The ensemble leaves less than PGD (masked gradients or few steps), in points'),
    'distances': (0.01, 'The ensemble leaves less than FMN (distances too large), in points'),
}


def disagreements(networks: list[dict]) -> list[str]:
    """Returns a sentence for each attack that flatters some of the networks, entries of
    result.json: PGD by more than 5 points, distances by more than 1; of several seeds the worst."""
    sentences = []
    for attack, (tolerated, text) in FLATTERS.items():
        leads = sorted((_lead(x.get('robust') or {}, attack), x['name']) for x in networks)
        worst = {name: lead for lead, name in leads if lead > tolerated}
        if worst:
            points = ', '.join(f'{name} {100 * lead:.1f}' for name, lead in reversed(worst.items()))
            sentences.append(f'{text}: {points}.')
    return sentences


def _lead(robust: dict, attack: str) -> float:
    """What an attack leaves minus what an ensemble leaves, 0 where that was not measured."""
    leads = [0.0]
    for ensemble in (robust[name] for name in ENSEMBLES if name in robust):
        entry = robust.get(attack) or {}
        left = entry.get('accuracy', entry.get('accuracy_at', {}).get(f'{ensemble["eps"]:g}'))
        alike = all(entry.get(key) == ensemble.get(key) for key in ('norm', 'examples'))
        if alike and left is not None:
            leads.append(left - ensemble['accuracy'])
    return max(leads)
