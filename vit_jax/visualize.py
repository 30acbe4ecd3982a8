r"""Draws what a model learned: the pictures of Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929.

vit_jax visualize runs/b16 --output=pictures photo.jpg another.png
vit_jax visualize L_16.npz --output=pictures --dataset=imagenet2012 \
    --split='validation[:128]' --preprocess='central_crop(0.875)'

filters: principal components of the patch filters. positions: similarity of the position
embeddings. attention_distance: mean attention distance of each head over the images. rollout: where
the model attends in each image. Writes each as PNG and PDF, and the numbers to visualize.json.
ResNets only have filters. MODEL (--model) is anything `evaluate --checkpoint` reads.
"""

import json

from absl import flags

from vit_jax.command_line import run
from vit_jax.data.listing import find_images
from vit_jax.data.sources import open_source
from vit_jax.parallel.run_files import as_path, written_locally
from vit_jax.pictures.learned import visualize
from vit_jax.weights.trained import load

flags.DEFINE_string("model", None, "A run's workdir, a checkpoint, a file or its URL.")
flags.DEFINE_string("output", None, "Folder for the pictures.", required=True)
flags.DEFINE_string("dataset", "", "Name, as in a recipe's data.dataset.")
flags.DEFINE_string("split", "test[:128]", "Split of the dataset.")
flags.DEFINE_string("data_dir", None, "Folder of prepared datasets.")
flags.DEFINE_string("preprocess", None, "As data.preprocess; by default the model's own.")
flags.DEFINE_integer("shown", 8, "Number of images with a drawn rollout.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Draws the pictures and prints where they are."""
    args = flags.FLAGS
    output = as_path(args.output)
    source = open_source(args.dataset, args.split, args.data_dir) if args.dataset else None
    files = find_images(arguments[1:])
    pictures, numbers = visualize(load(args.model), files, source, args.preprocess, args.shown)
    with written_locally(output) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            for ending in ("png", "pdf"):
                figure.savefig(folder / f"{name}.{ending}", dpi=200)
        (folder / "visualize.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{', '.join(pictures)} in {output}")


if __name__ == "__main__":
    run(main, "model", rest="IMAGE ...")
