"""scikit-learn's handwritten digits with corrupted training labels, as used by the examples and tests."""

from __future__ import annotations

import dataclasses

import torch
from sklearn.datasets import load_digits

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """A split of the 1,797 images, 8 x 8 pixels scaled to [0, 1], flattened to 64.

    Attributes:
        train: (images [n, 64], labels [n]) with corrupted labels.
        meta: A small set with right labels, disjoint from the others.
        test: The rest, with right labels.
        is_clean: Which training labels are right, bool [n].
    """

    train: tuple[torch.Tensor, torch.Tensor]
    meta: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    is_clean: torch.Tensor


def load(seed: int, *, noise: float = 0.4, num_meta: int = 100, num_test: int = 600, dtype=torch.float32) -> Digits:
    """Split the digits and replace a share of the training labels.

    Args:
        seed: Draws the split and the corruption.
        noise: Share of the training labels that is replaced by another class, uniformly.
        num_meta: Images in the clean meta set.
        num_test: Images in the test set.
        dtype: Dtype of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = load_digits()
    images = torch.tensor(raw.data / 16.0, dtype=dtype)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=generator)
    meta, test, train = order[:num_meta], order[num_meta : num_meta + num_test], order[num_meta + num_test :]
    corrupt = torch.rand(len(train), generator=generator) < noise
    shift = torch.randint(1, NUM_CLASSES, (len(train),), generator=generator)
    noisy = torch.where(corrupt, (labels[train] + shift) % NUM_CLASSES, labels[train])
    return Digits(
        train=(images[train], noisy),
        meta=(images[meta], labels[meta]),
        test=(images[test], labels[test]),
        is_clean=~corrupt,
    )


class Batches:
    """Shuffled batches of two tensors, anew in every pass; the last, smaller one is dropped."""

    def __init__(self, data: tuple[torch.Tensor, torch.Tensor], batch_size: int, seed: int) -> None:
        self._data = data
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return len(self._data[0]) // self._batch_size

    def __iter__(self):
        """Yield (images [b, 64], labels [b])."""
        order = torch.randperm(len(self._data[0]), generator=self._generator)
        for i in range(len(self)):
            pick = order[i * self._batch_size : (i + 1) * self._batch_size]
            yield self._data[0][pick], self._data[1][pick]
