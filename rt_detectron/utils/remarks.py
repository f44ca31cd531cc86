"""Warnings that other packages give each other as they are imported; a user can do nothing about them."""

import warnings

_REMARKS = (
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning),
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning),
    (r"pkg_resources is deprecated", UserWarning),
    (r"Deprecated call to .pkg_resources", DeprecationWarning),
    (r"The image decoding and encoding capabilities of TorchVision", DeprecationWarning),
)


def ignore_remarks() -> None:
    """Show none of them from now on. A library does so within ``warnings.catch_warnings()``."""
    for message, category in _REMARKS:
        warnings.filterwarnings("ignore", message, category)
