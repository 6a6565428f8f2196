"""Words that fall away or change places, and what must stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from luthier.data.augmentation import Augmentation
from luthier.types import Example

WORD_T = np.array([-1, 0, 1, 1, 2, 3, 3, 3, 4, -1])
"""[CLS], five words of one, two, one, three and one pieces, [SEP]."""


def example() -> Example:
    weight_T = np.zeros(10, dtype=np.float32)
    weight_T[-1] = 0.5
    return Example(np.arange(100, 110), weight_T, 7, target=np.array([3]), word_T=WORD_T)


def changed(delete: float, swap: float, seed: int) -> Example:
    return Augmentation(delete=delete, swap=swap).changed(example(), np.random.default_rng(seed))


def words(made: Example) -> list[tuple[int, ...]]:
    """The tokens of each word, in the order in which they stand."""
    assert made.word_T is not None
    found: list[tuple[int, ...]] = []
    last = -1
    for token, word in zip(made.ids_T.tolist(), made.word_T.tolist(), strict=True):
        if word >= 0 and word == last:
            found[-1] += (token,)
        elif word >= 0:
            found.append((token,))
        last = word
    return found


WORDS = [(101,), (102, 103), (104,), (105, 106, 107), (108,)]


@pytest.mark.parametrize("seed", range(20))
def test_swapping_keeps_every_word_whole_and_the_frame_in_place(seed: int) -> None:
    made = changed(0.0, 0.5, seed)
    assert Counter(words(made)) == Counter(WORDS)
    assert made.ids_T[0] == 100 and made.ids_T[-1] == 109
    assert (made.row, made.weight, made.weight_T[-1]) == (7, 0.5, 0.5)
    assert made.target is not None and made.target.tolist() == [3]


def test_a_swap_moves_two_words_most_of_the_time() -> None:
    orders = [words(changed(0.0, 0.1, seed)) for seed in range(200)]
    moved = [sum(a != b for a, b in zip(order, WORDS, strict=True)) for order in orders]
    assert set(moved) <= {0, 2}
    # A word is swapped with itself one time in five.
    assert 0.7 < np.mean([count == 2 for count in moved]) < 0.9


def test_words_fall_away_with_the_chance_asked_for() -> None:
    left = [len(words(changed(0.3, 0.0, seed))) for seed in range(400)]
    assert np.mean(left) == pytest.approx(0.7 * len(WORDS), abs=0.15)
    kept = [words(changed(0.3, 0.0, seed)) for seed in range(50)]
    assert all(order == [w for w in WORDS if w in order] for order in kept)


def test_one_word_always_stays() -> None:
    assert all(len(words(changed(0.99, 0.0, seed))) >= 1 for seed in range(200))


def test_the_same_numbers_change_a_row_alike() -> None:
    one, other = changed(0.3, 0.3, 5), changed(0.3, 0.3, 5)
    assert one.ids_T.tolist() == other.ids_T.tolist()
    assert any(changed(0.3, 0.3, s).ids_T.tolist() != one.ids_T.tolist() for s in range(6, 12))


def test_off_unless_asked_for() -> None:
    assert not Augmentation()
    assert Augmentation(delete=0.1) and Augmentation(swap=0.1)


def test_a_row_without_words_cannot_be_changed() -> None:
    plain = Example(np.arange(3), np.zeros(3, dtype=np.float32), 0)
    with pytest.raises(ValueError, match="words"):
        Augmentation(delete=0.1).changed(plain, np.random.default_rng(0))
    framed = Example(np.arange(2), np.zeros(2, np.float32), 0, word_T=np.array([-1, -1]))
    assert Augmentation(delete=0.9).changed(framed, np.random.default_rng(0)) is framed
