"""``blockcache.diffusers``: a bundle in a diffusers pipeline. It imports torch and diffusers."""

from blockcache.runtime.drop_in import BundleUNet, PresetScheduler, attach, detach

__all__ = ["BundleUNet", "PresetScheduler", "attach", "detach"]
