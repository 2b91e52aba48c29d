"""Packed integers: the layout of MatMulNBits, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics.packing import pack, pack_weight, pack_words, unpack


@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**16))
def test_unpack_undoes_pack(bits: int, rows: int, count: int, seed: int) -> None:
    q = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    packed = pack(q, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, count), q)


def test_the_first_number_lies_in_the_lowest_bits() -> None:
    assert pack(np.array([1, 2, 3]), 4, fill=9).tolist() == [0x21, 0x93]
    assert pack(np.array([0, 1, 2, 3]), 2).tolist() == [0b11100100]


def test_words_are_filled_from_their_lowest_bits() -> None:
    words = pack_words(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), 4)
    assert words.dtype == np.int32
    assert words.tolist() == [[0x87654321 - 2**32, 9]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_is_stored_by_output_in_blocks_of_inputs(bits: int) -> None:
    q = np.random.default_rng(0).integers(0, 2**bits, (40, 3))
    packed = pack_weight(q, bits, 16)
    assert packed.shape == (3, 3, 16 * bits // 8)
    numbers = unpack(packed, bits, 16).reshape(3, 48)
    np.testing.assert_array_equal(numbers[:, :40], q.T)
    assert (numbers[:, 40:] == 2 ** (bits - 1)).all()
