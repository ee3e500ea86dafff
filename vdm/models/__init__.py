"""Networks: tensors in, tensors out. They know neither schedules nor files nor other machines."""

from vdm.models.unet import UNet3D, UNetConfig
from vdm.models.vae import VAEConfig, VideoVAE

__all__ = ["UNet3D", "UNetConfig", "VAEConfig", "VideoVAE"]
