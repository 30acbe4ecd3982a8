"""Runs one campaign of faults and prints a line per fault and a summary as JSON.

python -m experiments.campaigns kills --command=pretrain --count=20 --folder=runs/campaigns
python -m experiments.campaigns damages --count=240
python -m experiments.campaigns pairs --count=6
python -m experiments.campaigns processes --count=14
python -m experiments.campaigns images --count=3000
python -m experiments.campaigns weights --count=10000  # of each of 7 formats
python -m experiments.campaigns photos --count=1000  # needs torch, see photos.py
python -m experiments.campaigns bombs

Ends with code 1 if any fault had a wrong outcome. Each campaign takes minutes on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

from experiments.campaigns import (
    bombs,
    damages,
    files,
    kills,
    pairs,
    photos,
    processes,
    weights,
)

CAMPAIGNS = {
    "kills": kills.campaign,
    "damages": damages.campaign,
    "pairs": pairs.campaign,
    "processes": processes.campaign,
    "images": files.images,
    "weights": weights.weights,
    "photos": photos.campaign,
    "bombs": bombs.campaign,
}
COUNTS = {
    **{"kills": 20, "damages": 240, "pairs": 6, "processes": 14, "images": 3000},
    **{"weights": 10_000, "photos": 1000, "bombs": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, help=f"number of faults; by default {COUNTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/campaigns"))
    parser.add_argument("--command", choices=kills.COMMANDS, default="pretrain", help="of kills")
    options = parser.parse_args()
    folder = (options.folder / options.campaign).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    more = {"command": options.command} if options.campaign == "kills" else {}
    count = COUNTS[options.campaign] if options.count is None else options.count
    outcomes = CAMPAIGNS[options.campaign](count, options.seed, folder, **more)
    print(json.dumps(outcomes, indent=1))
    sys.exit(any("WRONG" in name for name in outcomes))


if __name__ == "__main__":
    main()
