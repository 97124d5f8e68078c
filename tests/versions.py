"""What the oldest supported versions call otherwise than the newest."""

import jax
import jax.experimental

enable_x64 = getattr(jax, "enable_x64", None)
if enable_x64 is None:
    enable_x64 = jax.experimental.enable_x64
