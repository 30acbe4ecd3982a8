"""Writes model cards, and uploads models to Hugging Face's hub (needs `huggingface_hub`).

A card is a README.md that begins with YAML: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import InputError, unknown

CARD = "README.md"
_LIBRARIES = {"timm": "timm", "hugging_face": "transformers"}
LICENCE = "licence: "  # begins the note in which `formats.read` says it


def model_card(
    description: dict[str, Any],
    format: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> str:
    """Returns the card of a model in one of the formats `timm` and `hugging_face`.

    Args:
      description: JSON description, see `weights.formats`. A licence in its notes is stated.
      format: what the model is written as.
      license: the hub's identifier of the licence; None: that of the weights, if it is known.
      datasets: the hub's identifiers of the data of training.
      metrics: the hub's identifiers of what was measured.
    """
    notes = description.get("notes", ())
    known = [n.removeprefix(LICENCE) for n in notes if n.startswith(LICENCE)]
    fields: dict[str, Any] = {}
    if license is not None:
        fields["license"] = license
    elif known:
        listed = known[0].lower() == "apache-2.0"
        fields |= (
            {"license": "apache-2.0"}
            if listed
            else {"license": "other", "license_name": known[0].partition(",")[0]}
        )
    fields |= {"datasets": list(datasets)} if datasets else {}
    fields |= {"metrics": list(metrics)} if metrics else {}
    classes = description["num_classes"]
    task = "image-classification" if classes else "image-feature-extraction"
    fields |= {"tags": [task, "vit_jax"], "pipeline_tag": task, "library_name": _LIBRARIES[format]}
    # JSON values are YAML values, whatever characters a text has.
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    height, width = description["image_size"]
    variant = description["model"]["variant"]
    what = f"{classes} classes" if classes else "features, without a head"
    lines = [f"- {n.removeprefix(LICENCE) if n in known else n}" for n in notes]
    return "\n".join(
        [
            *("---", front, "---", "", f"# {variant}", ""),
            f"An image model of {height}x{width} pixels: {what}. Written by vit_jax.",
            *(["", *lines] if lines else []),
            "",
        ]
    )


def push(
    repository: str,
    write: Callable[[Path], None],
    description: dict[str, Any],
    format: str,
    *,
    private: bool = False,
    **about: Any,
) -> str:
    """Uploads a folder that `write` fills, and its card, in one commit; returns its address.

    `repository`: "owner/name"; it is created if it doesn't exist. `format` and `about`: of
    `model_card`. `huggingface_hub` takes the token from HF_TOKEN or its login. Raises ValueError
    for another name or format or without the package, ConnectionError if the hub can't be reached
    or refuses.
    """
    if format not in _LIBRARIES:
        raise unknown("format of the hub", format, _LIBRARIES)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"repository {repository!r}: expected owner/name, as on the hub")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise InputError(
            f"{repository}: uploading needs huggingface_hub: pip install huggingface_hub"
        ) from error
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        write(folder)
        (folder / CARD).write_text(model_card(description, format, **about))
        hub = huggingface_hub.HfApi()
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Upload the model"
            )
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConnectionError(
                f"{repository} was not uploaded: {reason}. Set HF_TOKEN to a token that may write"
            ) from error
    return f"{hub.endpoint}/{repository}"
