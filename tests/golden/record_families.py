"""Records the golden files of published families: `python tests/golden/record_families.py`.

Needs torch, timm and transformers. A file holds a folder as the library wrote it (file name -> its
bytes), images uint8 [2, 16, 16, 3] and [2, 24, 20, 3], and the library's logits or features of
them: of the second with position embeddings resized as the library does.
"""

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from timm.models import save_for_hf

HERE = Path(__file__).parent
SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4},
    **{"image_size": 16},
}
MLP = {"intermediate_size": 24}
TIMM = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}
MODELS = {
    "dinov2_registers": ("Dinov2WithRegisters", {**SIZES, "mlp_ratio": 2}, "Model"),
    "dinov3": ("DINOv3ViT", {**SIZES, **MLP, "num_register_tokens": 2}, "Model"),
    "clip": ("CLIPVision", {**SIZES, **MLP}, "Model"),
    "siglip": ("SiglipVision", {**SIZES, **MLP}, "Model"),
    "siglip2": ("Siglip2Vision", {**SIZES, **MLP, "num_patches": 16}, "Model"),
    "deit_distilled": ("deit_small_distilled_patch16_224", {**TIMM, "num_classes": 5}, None),
    "timm_dinov3": ("vit_small_patch16_dinov3", {**TIMM, "num_classes": 5}, None),
}


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model with random weights large enough that differences show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("periods"):
                scale = tensor.ndim == 1 and name.endswith("weight")
                noise = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise + float(scale))
    return model.eval()


def run(model: torch.nn.Module, images: np.ndarray, mean, std, **options) -> np.ndarray:
    """Returns logits, or pooled features, of images [B, H, W, 3] in [0, 255]."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = (pixels - mean) / std
    if isinstance(model, transformers.Siglip2VisionModel):  # takes patches
        shape = [side // 4 for side in images.shape[1:3]]
        pixels = pixels.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.flatten(3).flatten(1, 2)
        options = {"pixel_attention_mask": torch.ones(pixels.shape[:2])}
        options["spatial_shapes"] = torch.tensor([shape] * len(images))
    with torch.no_grad():
        output = model(pixels, **options)
    return getattr(output, "pooler_output", output).numpy()


def record(name: str) -> None:
    """Writes one golden file."""
    kind, arguments, suffix = MODELS[name]
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    others = np.random.default_rng(2).integers(0, 256, (2, 24, 20, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        if suffix is None:
            model = scrambled(timm.create_model(kind, **arguments))
            save_for_hf(model, place, model_args=arguments, safe_serialization=True)
            mean, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
        else:
            config = getattr(transformers, f"{kind}Config")(**arguments)
            model = scrambled(getattr(transformers, kind + suffix)(config))
            model.save_pretrained(place)
            processor = transformers.CLIPImageProcessor(
                size={"height": 16, "width": 16}, do_center_crop=False
            )
            processor.save_pretrained(place)
            mean, std = processor.image_mean, processor.image_std
        output = run(model, images, mean, std)
        if suffix is None:
            model.set_input_size(img_size=others.shape[1:3])
        options = (
            {"interpolate_pos_encoding": True} if kind in ("CLIPVision", "SiglipVision") else {}
        )
        other_output = run(model, others, mean, std, **options)
        files = {
            path.name: np.frombuffer(path.read_bytes(), np.uint8)
            for path in Path(place).iterdir()
            if path.suffix in (".json", ".safetensors")
        }
    arrays = {"images": images, "output": output, "others": others, "other_output": other_output}
    np.savez_compressed(HERE / f"family_{name}.npz", **files, **arrays)


if __name__ == "__main__":
    for name in MODELS:
        record(name)
