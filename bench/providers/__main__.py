"""Run as a program: the providers as a Markdown table, and why those that are absent are.

python -m bench.providers
"""

import torch

from bench.providers import PROVIDERS, Provider, Unavailable, version_of

HEADER = "| provider | package | logits | products | what |\n|---|---|---|---|---|"


def row(p: Provider) -> str:
    """A provider's line of the table."""
    return f"| `{p.name}` | {p.package} | {p.logits} | {p.passes} | {p.what} |"


def here(provider: Provider, device: str) -> str:
    """Its version, or the reason why it cannot run."""
    try:
        provider.load(device)
    except Unavailable as why:
        return f"not here: {why}"
    return version_of(provider.package)


def main() -> None:
    """Prints the table, and a line for each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(HEADER, *map(row, PROVIDERS), "", sep="\n")
    for provider in PROVIDERS:
        print(f"{provider.name:14} {here(provider, device)}")


if __name__ == "__main__":
    main()
