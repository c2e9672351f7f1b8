"""Images that scikit-learn ships: handwritten digits and patches of two photographs, 8 × 8 grey values a row."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from lmd_hf.compat import unreachable_errors


if TYPE_CHECKING:
    from datasets import Dataset


MNIST = "ylecun/mnist"
CONNECT_SECONDS = 5.0
SIDE = 8
PIXELS = SIDE * SIDE


def digits(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """All 1,797 digits (values 0…1, N × 64, float64) and their classes, in random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=random)
    return torch.from_numpy(images / images.max())[order], torch.from_numpy(labels)[order]


def patches(points: int, random: torch.Generator) -> Tensor:
    """Patches from random places of `china.jpg` and `flower.jpg`, as many of each (values 0…1, N × 64, float64)."""
    cut = []
    for place, image in enumerate(load_sample_images().images):
        seed = int(torch.randint(2**31, (1,), generator=random))
        share = points // 2 + (points % 2 if place == 0 else 0)
        cut.append(extract_patches_2d(image.mean(axis=2) / 255, (SIDE, SIDE), max_patches=share, random_state=seed))
    return torch.from_numpy(np.concatenate(cut)).reshape(-1, PIXELS)


def mnist(images: int) -> tuple[Tensor, Tensor] | None:
    """The first images of MNIST (values 0…1, N × 784, float64) and their classes; `None` where the Hub cannot be
    reached or does not have it."""
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(MNIST, timeout=CONNECT_SECONDS)  # `load_dataset` would try for half a minute
        rows = load_dataset(MNIST, split=f"train[:{images}]")
    except (HfHubHTTPError, OSError, *unreachable_errors()):
        return None
    return as_rows(rows)


def as_rows(images: "Dataset") -> tuple[Tensor, Tensor]:
    """A data set of grey images (`image`, `label`) as values 0…1, one image a row, float64, and classes."""
    pixels = np.stack([np.asarray(image) for image in images["image"]]).reshape(len(images), -1)
    return torch.from_numpy(pixels / 255.0), torch.tensor(list(images["label"]))
