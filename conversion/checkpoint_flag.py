"""--checkpoint and --which, as every command takes them that writes a network in another format."""

import argparse

from robustprune_jax import zoo


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--checkpoint', required=True, help='a folder of a run, a PyTorch file, a name of the zoo'
    )
    parser.add_argument(
        '--which', default='latest', help="of a folder: 'latest' (default), 'best' or a step"
    )


def read_network(args: argparse.Namespace) -> tuple[dict, dict]:
    """Returns the network's (variables, meta) as zoo.read does, and raises as it does."""
    return zoo.read(args.checkpoint, int(args.which) if args.which.isdigit() else args.which)
