# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from affect.compression import packing
from affect.compression.packing import pack, packed_bytes, unpack
from affect.compression.stored import (
    CodebookWeight,
    GridWeight,
    ResidualWeight,
    SplitWeight,
    build_weight,
    signed_levels,
    weight_node,
)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_codes_survive_packing_and_take_no_more_bytes_than_bits(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("bits", [1, 3, 11, 16])
@pytest.mark.parametrize("count", [16, 17, 31, 32, 100])
def test_many_codes_are_packed_piece_by_piece(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "PIECE", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, count).long(), codes)


def test_bits_are_laid_out_as_documented() -> None:
    # 3 bits each, lowest bit first: 5 = 101, 1 = 100, 6 = 011 -> 101100 01|1.
    assert pack(torch.tensor([5, 1, 6]), 3).tolist() == [0b10001101, 0b00000001]


@pytest.mark.parametrize(("codes", "bits"), [([4], 2), ([-1], 4), ([0], 0), ([0], 17)])
def test_codes_that_do_not_fit_are_refused(codes: list[int], bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack(torch.tensor(codes), bits)
    with pytest.raises(ValueError, match="bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 9)


def round_trip(weight: torch.nn.Module) -> torch.nn.Module:
    empty = build_weight(weight_node(weight))
    empty.load_state_dict(weight.state_dict())
    return empty


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.62])
def test_grid_decodes_as_its_formula(bits: int, exponent: float) -> None:
    n = signed_levels(bits)
    codes = torch.randint(-n, n + 1, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    largest = torch.tensor([0.1, 1.0, 2.0, 30.0])
    weight = GridWeight.of(codes, largest, bits, exponent)
    expected = codes.sign() * (codes.abs().double() / n) ** (1 / exponent) * largest.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(weight().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.integers().long(), codes)
    assert torch.equal(round_trip(weight)(), weight())
    assert weight.stored_bytes == packed_bytes(codes.numel(), bits) + 4 * 4 + 4


def test_one_scale_for_the_whole_tensor() -> None:
    weight = GridWeight.of(torch.tensor([[1, -1], [0, 1]]), torch.tensor([0.5]), 2)
    assert weight().tolist() == [[0.5, -0.5], [0.0, 0.5]]
    assert torch.equal(round_trip(weight)(), weight())


def test_codebooks_belong_to_blocks_of_rows_in_stored_order() -> None:
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    codebook = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    plain = CodebookWeight.of(codes, codebook)
    assert plain.bits == 2
    assert plain.row_groups().tolist() == [0, 0, 1]
    assert plain().tolist() == [[1, 2], [2, 2], [30, 10]]
    permuted = CodebookWeight.of(codes, codebook, rows=torch.tensor([2, 0, 1]))
    assert permuted().tolist() == [[2, 2], [30, 10], [1, 2]]
    assert torch.equal(round_trip(permuted)(), permuted())


def test_blocks_of_rows_may_be_uneven_and_have_scales_of_their_own() -> None:
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    several = CodebookWeight.of(codes, torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), blocks=[1, 2])
    assert several().tolist() == [[1, 2], [20, 20], [30, 10]]
    one = torch.tensor([[1.0, 2.0, 3.0]])
    by_block = CodebookWeight.of(codes, one, blocks=[1, 2], scale=torch.tensor([2.0, 4.0]), scales="block")
    assert by_block().tolist() == [[2, 4], [8, 8], [12, 4]]
    by_row = CodebookWeight.of(codes, one, torch.tensor([2, 0, 1]), scale=torch.tensor([2.0, 4.0, 8.0]), half=False)
    assert by_row().tolist() == [[8, 8], [24, 8], [2, 4]]
    for weight in (several, by_block, by_row):
        assert torch.equal(round_trip(weight)(), weight())
    assert several.stored_bytes == math.ceil(6 * 2 / 8) + 2 * 3 * 2
    assert by_block.stored_bytes == math.ceil(6 * 2 / 8) + 3 * 2 + 2 * 2
    assert by_row.stored_bytes == math.ceil(6 * 2 / 8) + 3 * 4 + 3 * 4 + math.ceil(3 * 2 / 8)


@pytest.mark.parametrize("coded", [True, False])
def test_kernels_belong_to_input_channels(coded: bool) -> None:
    """Two groups of two outputs and one input each, and kernels of two numbers."""
    values = torch.tensor([0.0, 1.0, 2.5])
    codes = torch.tensor([[0, 1], [2, 2], [1, 1]])
    kernels, own = (codes, values) if coded else (values[codes], None)
    weight = SplitWeight.of((4, 1, 2), torch.tensor([2, 1]), torch.tensor([[1], [0], [0], [0]]), kernels, 2, own)
    assert weight().tolist() == [[[2.5, 2.5]], [[0, 1]], [[1, 1]], [[1, 1]]]
    assert torch.equal(round_trip(weight)(), weight())
    assert weight.stored_bytes == 2 * 4 + 1 + (3 * 4 + 2 if coded else 6 * 4)


def test_residual_orders_add_up_on_the_rows_they_cover() -> None:
    first = GridWeight.of(torch.tensor([[1, 0], [-1, 1], [0, 0]]), torch.ones(3), 2)
    second = GridWeight.of(torch.tensor([[1, 1]]), torch.tensor([0.25]), 2)
    weight = ResidualWeight.of([first, second], [None, torch.tensor([2])])
    assert weight().tolist() == [[1, 0], [-1, 1], [0.25, 0.25]]
    assert torch.equal(round_trip(weight)(), weight())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"kind": "pickle", "shape": [1]}, "no kind of stored weight 'pickle'"),
        ({"shape": [1]}, "no kind of stored weight None"),
        ({"kind": "grid", "shape": [2, 2], "bits": 1}, "2 to 8 bits"),
        ({"kind": "grid", "shape": [2, 2], "bits": 4, "levels": 100}, "levels"),
        ({"kind": "grid", "shape": [2, 2], "bits": 4, "file": "x"}, "unexpected keyword"),
        ({"kind": "codebook", "shape": [2, 2], "bits": 4, "groups": 3}, "3 codebooks"),
        ({"kind": "codebook", "shape": [2, 2], "bits": 4, "blocks": [1, 2]}, "do not fit 1 codebooks and 2"),
        ({"kind": "codebook", "shape": [2, 2], "bits": 4, "entries": 17}, "a codebook of 17 entries"),
        ({"kind": "split", "shape": [2, 2], "kernels": 5, "bits": 1}, "5 distinct kernels"),
    ],
)
def test_nodes_that_describe_nothing_are_refused(node: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_weight(node)
