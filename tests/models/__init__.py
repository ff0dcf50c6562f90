"""Models of other libraries, trained while they are watched.

What lets the libraries work here and stay offline comes before any of them is imported.
"""

import os

import torch

# Nothing is downloaded: every model is built from its configuration.
os.environ["HF_HUB_OFFLINE"] = "1"


def _import_torchvision() -> None:
    """Also beside a torch for another platform than its own, the CPU's, say.

    Its compiled operators don't load there, and importing it registers what they do without
    data. The models that are tested here call none of them: their names are enough.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        _kept.append(library)


# What a library object defined goes with it.
_kept: list[torch.library.Library] = []
_import_torchvision()
