"""Packs ImageNet-21k as the TFDS dataset `imagenet21k`, in ArrayRecord format, without TensorFlow.

python experiments/launch/imagenet21k.py --tars=winter21_whole --data_dir=/data

TFDS has no builder for it. `tars` holds one file a class, n01440764.tar and so on, as image-net.org
ships them; the classes are those that are there, in the order of their names. Everything goes into
the split `full`, in an order that depends on the files' names alone: its slices are random samples,
though not those of the paper's authors. An image that cannot be read is named in the log and left
out.
"""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow_datasets as tfds
from absl import app, flags, logging

from vit_jax.data.decode import decode_image

TARS = flags.DEFINE_string("tars", None, "Folder of the classes' tar files.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS datasets are kept.", required=True)


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
    """Images under the names of their WordNet synsets."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, tars: list[Path], **kwargs):
        self._tars = tars
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = [tar.stem for tar in self._tars]
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=names),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"full": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        with ThreadPoolExecutor() as pool:
            for tar in self._tars:
                with tarfile.open(tar) as file:
                    images = [(m.name, file.extractfile(m).read()) for m in file if m.isfile()]
                for (name, data), readable in zip(images, pool.map(_readable, images), strict=True):
                    if readable:
                        yield f"{tar.stem}/{name}", {"image": io.BytesIO(data), "label": tar.stem}


def _readable(image: tuple[str, bytes]) -> bool:
    try:
        decode_image(image[1])
    except ValueError as error:
        logging.warning("left out %s: %s", image[0], error)
        return False
    return True


def main(_) -> None:
    """Writes the dataset, which takes as much room again for its shuffling."""
    tars = sorted(Path(TARS.value).glob("n*.tar"))
    if not tars:
        raise FileNotFoundError(f"no n*.tar in {TARS.value}: expected one tar file a class")
    builder = Imagenet21k(tars, data_dir=DATA_DIR.value, file_format="array_record")
    builder.download_and_prepare()
    images = builder.info.splits["full"].num_examples
    print(f"{builder.data_dir}: {images} images of {len(tars)} classes")


if __name__ == "__main__":
    app.run(main)
