"""The bitsandbytes backend of quantmill."""

import logging

__version__ = "0.1.0"


def _worth_saying(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not (
        text.startswith("Failed to load CPU gemm_4bit_forward") and "No module named" in text
    )


# Said at import (backends/cpu/ops.py) on every CPU with AVX-512 BF16 where the package `kernels` is
# not installed. It is optional: a gemm from the hub instead of the library's own compiled one,
# which is then used and needs nothing done. Where `kernels` is there but fails, the reason is
# another one and is still said. Here, because it has to be in place before the first import of
# bitsandbytes, whoever makes it; this module is imported when plugins are discovered.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_worth_saying)
