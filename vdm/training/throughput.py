"""How fast a run is, and what it takes: clips and seconds, waiting for data, operations, memory."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from vdm import dist
from vdm.config import Config
from vdm.data.loader import Batch
from vdm.flops import unet_forward
from vdm.training.diagnostics import means_by_timestep
from vdm.training.faults import mean_of_finite

# Dense fp16 and bf16 matrix products with sums in fp32, TFLOP/s, from the vendor's data sheets; the first name that a
# device's contains counts. float32 has no row: what PyTorch then uses (TF32 or not) differs from layer to layer.
HALF_PEAKS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("RTX A6000", 154.8),
    ("RTX 4080", 97.5),
    ("RTX 4070", 58.3),
    ("RTX 3060", 25.3),
)


def peak_tflops(device_name: str, *, mixed_precision: str) -> float | None:
    """What a device can do at most, in TFLOP/s; None where that is not known, as of float32."""
    if mixed_precision == "no":
        return None
    return next((peak for name, peak in HALF_PEAKS if name in device_name), None)


class Window:
    """The steps since the last line of the log; of several processes each has its share of the clips."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self._forget()

    def _forget(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.seconds = self.waited = 0.0
        self.clips: Counter[int] = Counter()  # by their number of frames

    def add(self, values: dict[str, float], batches: Sequence[Batch], *, waited: float, seconds: float) -> None:
        """A step: its numbers, its micro-batches, how long it waited for them, and took in all."""
        self.steps.append(values)
        self.waited += waited
        self.seconds += seconds
        for batch in batches:
            self.clips[batch.video.shape[2]] += len(batch.ids) * dist.size()

    def close(self) -> dict[str, float]:
        """What to log of the window, which begins anew: losses as means over its steps, other numbers of its last."""
        assert self.steps, "a window holds a step"
        last = {name: value for name, value in self.steps[-1].items() if not name.startswith(("sum_t", "count_t"))}
        numbers = {
            **last,
            "loss": mean_of_finite([step["loss"] for step in self.steps]),
            **means_by_timestep(self.steps),
            "videos_per_second": self.clips.total() / self.seconds,
            "seconds_per_step": self.seconds / len(self.steps),
            "data_wait_share": self.waited / self.seconds,
            **self._operations(),
            **peak_memory(self.device),
        }
        self._forget()
        return numbers

    def _operations(self) -> dict[str, float]:
        """`tflops`: operations of the UNet a second, in 1e12, of a forward pass and a backward pass of twice as many;
        what is computed again to save memory does not count, nor do the VAE and the text tower. `mfu`: their share of
        what the device can do, where that is known.

        A LoRA needs no gradients of most weights, which is half of the backward pass.
        """
        if self.config.training.task != "unet":
            return {}
        passes = 3 if self.config.training.lora_rank is None else 2
        per_frame = {frames: unet_forward(self.config, num_frames=frames) for frames in self.clips}
        tflops = passes * sum(per_frame[frames] * count for frames, count in self.clips.items()) / self.seconds / 1e12
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = peak_tflops(name, mixed_precision=self.config.training.mixed_precision)
        return {"tflops": tflops} | ({} if peak is None else {"mfu": tflops / (peak * dist.size())})


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory so far, in 1e9 bytes: `peak_memory_gb` of tensors on a GPU, else `peak_rss_gb` of the process."""
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
