"""scikit-learn's handwritten digits with corrupted training labels, as used by the examples and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits

NUM_CLASSES = 10
NUM_PIXELS = 64

Data = tuple[torch.Tensor, torch.Tensor]  # images [n, 64], labels [n]


@dataclasses.dataclass(frozen=True)
class Digits:
    """A split of the 1,797 images, 8 x 8 pixels scaled to [0, 1], flattened to 64.

    Attributes:
        train: Images and labels, some of them corrupted.
        meta: A small set with right labels, disjoint from the others.
        test: Right labels; nothing is trained or chosen on it.
        is_clean: Which training labels are right, bool [n].
    """

    train: Data
    meta: Data
    test: Data
    is_clean: torch.Tensor

    @property
    def clean_train(self) -> Data:
        """The part of the training set whose labels are right."""
        return self.train[0][self.is_clean], self.train[1][self.is_clean]


def load(
    seed: int,
    *,
    noise: float = 0.4,
    num_meta: int = 100,
    num_test: int = 600,
    dtype: torch.dtype = torch.float32,
) -> Digits:
    """Split the digits and replace a share of the training labels.

    Args:
        seed: Draws the split and the corruption; the dtype does not change them.
        noise: Share of the training labels that is replaced, each by one of the nine other classes.
        num_meta: Images in the clean meta set.
        num_test: Images in the test set.
        dtype: Dtype of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = load_digits()
    images = torch.tensor(raw.data / 16.0, dtype=dtype)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=generator)
    meta, test, train = order.split([num_meta, num_test, len(order) - num_meta - num_test])
    corrupt = torch.randperm(len(train), generator=generator) < round(noise * len(train))
    shift = torch.randint(1, NUM_CLASSES, (len(train),), generator=generator)
    noisy = torch.where(corrupt, (labels[train] + shift) % NUM_CLASSES, labels[train])
    return Digits(
        train=(images[train], noisy),
        meta=(images[meta], labels[meta]),
        test=(images[test], labels[test]),
        is_clean=~corrupt,
    )


class Batches:
    """Shuffled batches, in a new order in every pass; a last, smaller one is dropped.

    Args:
        data: Images and labels.
        batch_size: Samples in a batch; all of them where there are fewer.
        seed: Draws the orders.

    Attributes:
        generator: What draws the orders; under this name a plan finds it, to save and restore the position in the data.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self._data = data
        self._batch_size = min(batch_size, len(data[0]))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return len(self._data[0]) // self._batch_size

    def __iter__(self) -> Iterator[Data]:
        """Yield images [b, 64] and labels [b]."""
        order = torch.randperm(len(self._data[0]), generator=self.generator)
        for i in range(len(self)):
            pick = order[i * self._batch_size : (i + 1) * self._batch_size]
            yield self._data[0][pick], self._data[1][pick]
