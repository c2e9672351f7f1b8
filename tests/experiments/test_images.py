"""Images as rows: digits, patches of photographs, and MNIST where the Hub has it."""

import datasets
import numpy as np
import torch
from PIL import Image

from lmd_hf.experiments import images
from lmd_hf.experiments.seeding import generator


def test_digits_are_shuffled_with_their_classes():
    x, labels = images.digits(generator("x", 0))
    again, other = images.digits(generator("x", 0))[0], images.digits(generator("x", 1))[0]
    assert (x.shape, x.dtype, sorted(labels.unique().tolist())) == ((1797, 64), torch.float64, list(range(10)))
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    zeros = x[labels == 0].mean(dim=0)
    assert zeros[3 * 8 + 3] < 0.5 * zeros[3 * 8 + 5]  # a nought is hollow


def test_patches_come_from_both_photographs():
    x = images.patches(101, generator("x", 0))
    assert x.shape == (101, 64)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.std(dim=1).mean() < 0.7 * x.std()  # neighbouring pixels of a photograph are alike


def test_a_hub_without_mnist_gives_none(hub):
    assert images.mnist(10) is None


def test_a_data_set_of_images_becomes_rows():
    squares = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (0, 255)]
    rows = datasets.Dataset.from_dict({"image": squares, "label": [3, 7]})
    pixels, labels = images.as_rows(rows.cast_column("image", datasets.Image()))
    assert pixels.tolist() == [[0.0] * 16, [1.0] * 16]
    assert labels.tolist() == [3, 7]
