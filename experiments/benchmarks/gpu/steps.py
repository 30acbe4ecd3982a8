"""Training steps to be timed: ours, and timm's under torch.compile.

Both train on one random uint8 batch that lies on the device, normalise it in the step, compute in
bfloat16 with float32 parameters and moments, and use softmax cross-entropy, gradient clipping to
norm 1 and fused AdamW. Each class is used through `worker.Worker`: its methods take and return what
JSON can hold.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.benchmarks.gpu.drawing import CLASSES, draw
from vit_jax.costs.chips import GIB

OUTPUTS = 1000
TIMM = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}


def random_batch(size: int, image_size: int) -> dict[str, np.ndarray]:
    """Returns uint8 images [size, image_size, image_size, 3] and int32 labels [size]."""
    rng = np.random.default_rng(0)
    shape = (size, image_size, image_size, 3)
    return {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, OUTPUTS, size, np.int32),
    }


def drawn_batch(first: int, size: int, image_size: int) -> dict[str, np.ndarray]:
    """Returns the images of `drawing.draw` and their labels, as `random_batch` does."""
    indices = range(first, first + size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda i: draw(i, (image_size, image_size)), indices))
    return {"image": np.stack(images), "label": np.array([i % CLASSES for i in indices], np.int32)}


class Ours:
    """Our training step at several batch sizes; one state at a time is on the device.

    Args:
      variant: such as ViT-B/16.
      image_size: pixels.
      options: other fields of `ModelConfig`.
      fields: fields of `TrainConfig`, such as accumulation.
      devices: by default the first one here.
    """

    def __init__(
        self,
        variant: str,
        image_size: int = 224,
        options: dict[str, Any] | None = None,
        fields: dict[str, Any] | None = None,
        devices: list | None = None,
    ):
        import jax

        from vit_jax.parallel.mesh import MeshConfig, make_mesh

        self._mesh = make_mesh(MeshConfig(), devices or jax.devices()[:1])
        self._variant, self._image_size = variant, image_size
        self._options, self._fields = options or {}, fields or {}
        self._programs: dict[int, Any] = {}
        self._batch_size, self._state, self._batch = None, None, None

    def compile(self, batch: int, fit: bool = False) -> dict[str, Any]:
        """Compiles for a batch size; `fit` chooses microbatches and remat that fit the device.

        Returns the seconds, the compiler's peak memory in GiB, the model FLOPs of a step, and what
        was chosen.
        """
        from vit_jax.costs.compiled import memory
        from vit_jax.training.memory import compile_step, device_memory, fit_memory

        began, said = time.perf_counter(), ""
        training = self._training(batch)
        if fit:
            accumulation, remat, said = fit_memory(training, device_memory())
            training = self._training(batch, {"accumulation": accumulation}, {"remat": remat})
        compiled = compile_step(self._changed(training))
        self._programs[batch] = training, compiled
        return {
            "compile_seconds": time.perf_counter() - began,
            "predicted_gib": memory(compiled).peak / GIB,
            "model_flops": training.flops(0, 1),
            "accumulation": training.config.accumulation,
            "remat": training.config.model.remat,
            "attention": self._attention(training.model),
            "image_size": self._image_size,
            "device": self._mesh.devices.flat[0].device_kind,
            **({"fitted": said} if said else {}),
        }

    def run(self, batch: int, steps: int) -> float:
        """Runs steps one after the other; returns seconds per step."""
        import jax
        import jax.numpy as jnp

        _, step = self._programs[batch]
        if self._batch_size != batch:
            self._start(batch)
        peak = jnp.float32(1e-3)
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = step(self._state, self._batch, peak)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / steps

    def losses(self, batch: int, steps: int, batches: int = 1) -> list[float]:
        """Returns the losses of the first steps from the initial state, on drawn images in turn.

        The peak learning rate is 3e-4.
        """
        import jax
        import jax.numpy as jnp

        from vit_jax.parallel.mesh import put_batch

        _, step = self._programs[batch]
        self._start(batch)
        host = (drawn_batch(i * batch, batch, self._image_size) for i in range(batches))
        data, found = [put_batch(self._mesh, images) for images in host], []
        for i in range(steps):
            self._state, metrics = step(self._state, data[i % batches], jnp.float32(3e-4))
            found.append(metrics["loss"])
        return [float(loss) for loss in jax.device_get(found)]

    def trace(self, batch: int, steps: int, folder: str) -> None:
        """Writes an XProf trace of steps after warm-up."""
        import jax

        with jax.profiler.trace(folder):
            self.run(batch, steps)

    def program(self, batch: int) -> Any:
        """Returns the compiled step as a `vit_jax.costs.compiled.Program`."""
        from vit_jax.costs.compiled import Program

        return Program(self._programs[batch][1].as_text())

    def memory(self) -> dict[str, float]:
        """Returns the device's peak and present memory of arrays, in GiB; empty if unknown."""
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        keys = {"peak_gib": "peak_bytes_in_use", "in_use_gib": "bytes_in_use"}
        return {name: stats[key] / GIB for name, key in keys.items() if key in stats}

    def _training(self, batch: int, fields: dict | None = None, options: dict | None = None):
        from experiments.benchmarks.yardstick import recipe
        from vit_jax.models.variants import ModelConfig
        from vit_jax.training.recipe import build_training

        model = ModelConfig(self._variant, **{**self._options, **(options or {})})
        fields = {**self._fields, **(fields or {})}
        config = recipe(model, batch, self._image_size, "float32", **fields)
        return build_training(config, self._mesh, OUTPUTS, 1_281_167)

    def _changed(self, training: Any) -> Any:
        """The training whose step is compiled; its state is that of `training`."""
        return training

    def _attention(self, model: Any) -> str:
        from vit_jax.models.hardware import choose_attention
        from vit_jax.parallel.mesh import use_mesh

        module = model.module.config
        tokens = model.grid[0] * model.grid[1] + model.module.class_token
        head = module.width // module.num_heads
        with use_mesh(self._mesh):
            return choose_attention(model.config.attention, tokens, head, module.dtype, plain=False)

    def _start(self, batch: int) -> None:
        """Replaces the state on the device by the initial one, and the batch."""
        import jax

        from vit_jax.parallel.mesh import put_batch, use_mesh
        from vit_jax.training.initial import fresh_state

        self._state = self._batch = None  # frees their memory first
        training, _ = self._programs[batch]
        with use_mesh(self._mesh):
            self._batch = put_batch(self._mesh, random_batch(batch, self._image_size))
            self._state = jax.block_until_ready(fresh_state(training)(jax.random.key(0)))
        self._batch_size = batch


class Quantized(Ours):
    """Our step with the MLP's products in 8 bits, forward and backward, by qwix.

    Args:
      dtype: "int8" or "float8_e4m3fn", whose gradients are float8_e5m2.
      **start: of `Ours`.
    """

    def __init__(self, dtype: str, **start: Any):
        super().__init__(**start)
        self._dtype = dtype

    def _changed(self, training: Any) -> Any:
        import dataclasses

        import jax
        import qwix

        from vit_jax.models import dense

        def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

        dense.multiply = multiply  # qwix finds this product, but not that of x @ kernel
        backward = "float8_e5m2" if self._dtype.startswith("float8") else self._dtype
        types = {"weight_qtype": self._dtype, "act_qtype": self._dtype, "bwd_qtype": backward}
        provider = qwix.QtProvider([qwix.QtRule(module_path=".*Mlp.*", **types)])
        module = qwix.quantize_model(training.model.module, provider)
        model = dataclasses.replace(training.model, module=module)
        return dataclasses.replace(training, model=model)


class Timm:
    """timm's model under torch.compile, bfloat16 autocast and fused AdamW."""

    def __init__(self, variant: str, image_size: int = 224, device: str = "cuda"):
        import timm
        import torch

        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self._device = device
        self._model = timm.create_model(TIMM[variant], img_size=image_size, num_classes=OUTPUTS)
        self._model = self._model.to(device)
        self._image_size = image_size

        def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16):
                logits = self._model(images.float() / 127.5 - 1.0)
                return torch.nn.functional.cross_entropy(logits, labels)

        self._loss = torch.compile(loss)
        self._optimizer, self._batch = None, None

    def compile(self, batch: int) -> dict[str, float]:
        """Compiles in a first step, then frees all but the parameters; returns the seconds."""
        import torch

        began = time.perf_counter()
        self.run(batch, 1)
        self._optimizer = self._batch = None
        self._model.zero_grad(set_to_none=True)
        if self._device == "cuda":
            torch.cuda.empty_cache()
        return {"compile_seconds": time.perf_counter() - began}

    def run(self, batch: int, steps: int) -> float:
        """Runs steps one after the other; returns seconds per step."""
        import torch

        if self._optimizer is None:
            host = random_batch(batch, self._image_size)
            images, labels = (torch.from_numpy(host[k]).to(self._device) for k in host)
            self._batch = images.permute(0, 3, 1, 2), labels.long()
            self._optimizer = torch.optim.AdamW(
                self._model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True
            )
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return (time.perf_counter() - began) / steps

    def kernels(self, batch: int, steps: int) -> list[tuple[str, float, float]]:
        """Profiles steps; returns (name, start, duration in ms) of the device's kernels."""
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self._device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiled:
            self.run(batch, steps)
        return [
            (event.name, event.time_range.start / 1e3, event.time_range.elapsed_us() / 1e3)
            for event in profiled.events()
            if not event.cpu_children
        ]

    def memory(self) -> dict[str, float]:
        """Returns the device's peak memory of tensors in GiB; empty if unknown."""
        import torch

        if self._device != "cuda":
            return {}
        return {"peak_gib": torch.cuda.max_memory_allocated() / GIB}

    def _step(self) -> None:
        import torch

        self._loss(*self._batch).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
