"""Write the training pictures as a reference for `qdeploy evaluate`, those of each emoji group in a folder of its own.

python -m training.reference --work DIR -o FOLDER                   those of `builtin:emoji`
python -m training.reference --work DIR --unconditional -o FOLDER   those of `builtin:emoji-uncond`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from qdeploy.base.files import stage_folder
from training.data import load_for, select_creatures
from training.layout import run_script


def main() -> None:
    """Write every training picture as a PNG, in a folder for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the training data")
    parser.add_argument("--unconditional", action="store_true", help="only those that the unconditional model learned")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()

    emoji = load_for(args.work)
    if args.unconditional:
        emoji = select_creatures(emoji)
    with stage_folder(args.out) as scratch:
        for item in emoji:
            folder = scratch / item.group
            folder.mkdir(exist_ok=True)
            Image.fromarray(item.pixels).save(folder / f"{item.hexcode}.png")
    print(f"{len(emoji)} pictures are in {args.out}")


if __name__ == "__main__":
    run_script(main)
