use half::f16;
use proptest::prelude::*;

use super::*;

const ROWS: usize = TILE_ROWS;

fn layout(
    rows: usize,
    cols: usize,
    group_size: usize,
    coding: ScaleCoding,
    bits: &[u8],
) -> LayerLayout {
    let widths: Vec<_> = bits.iter().map(|&bits| BitWidth::new(bits).unwrap()).collect();
    LayerLayout::new(rows, cols, group_size, coding, &widths).unwrap()
}

const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };

#[test]
fn layout_takes_exactly_n_bits_per_code() {
    for bits in 1..=8 {
        let layout = layout(32, 80, 48, TWO_LEVEL, &[bits, bits]);
        assert_eq!(layout.tiles() * layout.tile_code_bytes() * 8, 32 * 80 * usize::from(bits));
    }
}

#[test]
fn layout_of_any_columns_stores_whole_units() {
    for (cols, group_size, stored) in
        [(1, 64, &[16][..]), (15, 16, &[16]), (17, 64, &[32]), (72, 32, &[32, 32, 16])]
    {
        for coding in [TWO_LEVEL, ScaleCoding::Paper] {
            let widths = vec![3; stored.len()];
            let padded = layout(17, cols, group_size, coding, &widths);
            let found: Vec<_> = padded.groups().iter().map(Group::stored_cols).collect();
            assert_eq!((&*found, padded.has_padding_columns()), (stored, true), "{cols}");
            assert_eq!(padded.groups().iter().map(|group| group.cols.len()).sum::<usize>(), cols);
            // As a layer of as many columns as are stored.
            let whole = layout(17, stored.iter().sum(), group_size, coding, &widths);
            assert!(!whole.has_padding_columns());
            assert_eq!(padded.stored_bits(), whole.stored_bits());
        }
    }
}

/// A layer of one column and one of 15 more, of which only the first counts, have the same bytes.
#[test]
fn padding_columns_are_packed_as_codes_of_zero() {
    for bits in 1..=8 {
        let packed = |cols: usize| {
            let mut layer = PackedLayer::zeroed(layout(16, cols, 16, TWO_LEVEL, &[bits]));
            let mut columns = vec![[0; ROWS]; cols];
            columns[0] = [1; ROWS];
            layer.tiles_mut()[0].set_codes(0, &columns);
            layer.parts().0.to_vec()
        };
        assert_eq!(packed(1), packed(16), "{bits} bits");
    }
}

#[test]
fn layout_bad_parameters_are_refused_by_rule() {
    let width = BitWidth::new(3).unwrap();
    let new = |rows, cols, group_size, coding, widths: usize| {
        LayerLayout::new(rows, cols, group_size, coding, &vec![width; widths]).unwrap_err().0
    };
    assert_eq!(new(0, 64, 64, TWO_LEVEL, 1), "F5");
    assert_eq!(new(16, 0, 64, TWO_LEVEL, 0), "F5");
    assert_eq!(new(16, (1 << 28) + 1, 1 << 28, TWO_LEVEL, 2), "F5");
    assert_eq!(new(16, 64, 24, TWO_LEVEL, 3), "F5");
    assert_eq!(new(16, 64, 0, TWO_LEVEL, 3), "F5");
    let coding = ScaleCoding::TwoLevel { sub_group: 48, scale_bits: 4 };
    assert_eq!(new(16, 64, 64, coding, 1), "F5");
    let coding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 5 };
    assert_eq!(new(16, 64, 64, coding, 1), "F5");
    assert_eq!(new(16, 80, 64, TWO_LEVEL, 1), "F6");
    assert_eq!(BitWidth::new(0), None);
    assert_eq!(BitWidth::new(9), None);
}

#[test]
fn worked_example_equals_the_specification() {
    let coding = ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 4 };
    let mut layer = PackedLayer::zeroed(layout(16, 16, 16, coding, &[3]));
    let all: Vec<CodeColumn> =
        (0..16).map(|c| std::array::from_fn(|r| ((r + c) % 8) as u8)).collect();
    for mut tile in layer.tiles_mut() {
        tile.set_codes(0, &all);
        tile.set_two_level(
            0,
            0,
            &std::array::from_fn(|r| r as u8),
            &std::array::from_fn(|r| 15 - r as u8),
        );
    }
    let specification = include_str!("../../../docs/format.md");
    let (codes, scales, _) = layer.parts();
    for (fence, bytes) in [("```hex codes", codes), ("```hex scales", scales)] {
        let block = specification.split(fence).nth(1).and_then(|rest| rest.split("```").next());
        let expected: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let found: Vec<&str> = block.unwrap().split_whitespace().collect();
        assert_eq!(found, expected, "{fence}");
    }
    let mut narrow = PackedLayer::zeroed(self::layout(16, 12, 16, coding, &[3]));
    narrow.tiles_mut()[0].set_codes(0, &all[..12]);
    assert_eq!(narrow.parts().0[4..8], [0x15, 0x2a, 0x3f, 0x00]);
}

#[test]
fn paper_scales_are_read_back() {
    let mut layer = PackedLayer::zeroed(layout(16, 48, 16, ScaleCoding::Paper, &[1, 3, 8]));
    let scale: [f16; ROWS] = std::array::from_fn(|r| f16::from_f32(0.25 + r as f32));
    let mean: [f16; ROWS] = std::array::from_fn(|r| f16::from_f32(r as f32 - 3.5));
    let three: CodeColumn = std::array::from_fn(|r| (r * 5 % 8) as u8);
    let eight: CodeColumn = std::array::from_fn(|r| (r * 37 % 256) as u8);
    for mut tile in layer.tiles_mut() {
        tile.set_binary(0, &scale, &mean);
        tile.set_affine(1, &scale, &three);
        tile.set_affine(2, &scale, &eight);
    }
    let view = layer.view();
    let groups = view.layout().groups();
    let (factor, offset) = view.scales(0, &groups[0], 0);
    for r in 0..ROWS {
        assert_eq!(offset[r], mean[r].to_f32() - scale[r].to_f32());
        assert_eq!(factor[r] + offset[r], mean[r].to_f32() + scale[r].to_f32());
    }
    for (group, zero) in [(1, three), (2, eight)] {
        let (factor, offset) = view.scales(0, &groups[group], 0);
        for r in 0..ROWS {
            assert_eq!(factor[r], scale[r].to_f32());
            assert_eq!(offset[r], -scale[r].to_f32() * f32::from(zero[r]));
        }
    }
    assert_eq!(view.row_scales(0), ([1.0; ROWS], [1.0; ROWS]));
}

const TRELLIS: ScaleCoding = ScaleCoding::Trellis { sub_group: 32 };

/// The numbers in a block of the specification.
fn block(fence: &str, radix: u32) -> Vec<u8> {
    let specification = include_str!("../../../docs/format.md");
    let block = specification.split(fence).nth(1).and_then(|rest| rest.split("```").next());
    let numbers = block.unwrap().split_whitespace();
    numbers.map(|number| u8::from_str_radix(number, radix).unwrap()).collect()
}

/// The windows of a column by row, bit by bit (F24).
fn windows_by_row(codes: &[u8], bits: usize) -> Vec<u8> {
    let row_at = |place: usize| (place as u8 % 32).reverse_bits() as usize >> 3;
    let bit = |bit: usize| codes[row_at(bit / bits)] >> (bit % bits) & 1;
    let window = |row: usize| (0..8).map(|i| bit(row_at(row) * bits + i) << i).sum();
    (0..32).map(window).collect()
}

#[test]
fn trellis_windows_and_sums_equal_the_specification() {
    let codes: Vec<u8> = (0..32).map(|r| ((3 * r + r / 8) % 8) as u8).collect();
    assert_eq!(block("```hex windows", 16), windows_by_row(&codes, 3));
    let mut layer = PackedLayer::zeroed(layout(32, 1, 16, TRELLIS, &[3]));
    for (mut tile, codes) in layer.tiles_mut().into_iter().zip(codes.as_chunks().0) {
        tile.set_codes(0, &[*codes]);
    }
    let view = layer.view();
    let sums = [0, 1].map(|tile| {
        let mut columns = [[0; ROWS]];
        view.codes(tile, &view.layout().groups()[0], &mut columns);
        columns[0]
    });
    assert_eq!(block("```sums", 10), sums.as_flattened());
}

#[test]
fn trellis_tables_equal_the_specification() {
    let specification = include_str!("../../../docs/format.md");
    let block = specification.split("```tables").nth(1).and_then(|rest| rest.split("```").next());
    let mut lines = block.unwrap().split_terminator('\n').skip(1);
    for bits in 1..=6 {
        let WindowTable { low, high } = WindowTable::of(BitWidth::new(bits).unwrap());
        for (name, table) in [("low", low), ("high", high)] {
            let mut line = lines.next().unwrap().split_whitespace();
            assert_eq!((line.next(), line.next()), (Some(&*bits.to_string()), Some(name)));
            assert!(line.map(|number| number.parse::<u8>().unwrap()).eq(table.iter().copied()));
        }
    }
    assert_eq!(lines.next(), None);
    for bits in 7..=8 {
        let entries = WindowTable::of(BitWidth::new(bits).unwrap()).entries();
        assert!(
            (0..=255).all(|window| entries[usize::from(window)] == window & u8::MAX >> (8 - bits))
        );
    }
}

#[test]
fn trellis_scales_are_read_back() {
    let mut layer = PackedLayer::zeroed(layout(40, 96, 48, TRELLIS, &[2, 8]));
    assert_eq!((layer.layout().tiles(), layer.layout().tile_scale_bytes()), (4, 4 * 8));
    let s: CodeColumn = std::array::from_fn(|r| (r * 7 % 16) as u8);
    let d: [f16; ROWS] = std::array::from_fn(|r| f16::from_f32(0.5 + r as f32));
    for (group, run) in [(0, 1), (1, 0)] {
        let mut tiles = layer.tiles_mut();
        tiles[2].set_trellis_scales(group, run, &s);
        tiles[2].set_row_scales(&d, &d);
    }
    let view = layer.view();
    let groups = view.layout().groups();
    let offset = s.map(|s| -64.0 * f32::from(s));
    assert_eq!(view.scales(2, &groups[0], 1), (s.map(f32::from), offset));
    assert_eq!(view.scales(2, &groups[1], 0), (s.map(|s| f32::from(s) / 2.0), offset));
    assert_eq!(view.scales(2, &groups[0], 0).0, [0.0; ROWS]);
    assert_eq!(view.row_scales(2), (d.map(f16::to_f32), d.map(f16::to_f32)));
}

proptest! {
    #[test]
    fn trellis_codes_are_those_of_the_windows(
        bits in 1u8..=8,
        codes in proptest::collection::vec(any::<[u8; 32]>(), 1..40),
    ) {
        let width = BitWidth::new(bits).unwrap();
        let group_size = codes.len().next_multiple_of(UNIT_COLS);
        let mut layer = PackedLayer::zeroed(layout(20, codes.len(), group_size, TRELLIS, &[bits]));
        let codes: Vec<_> = codes.iter().map(|column| column.map(|c| c & width.max_code())).collect();
        for (half, tile) in layer.tiles_mut().iter_mut().enumerate() {
            let of_tile = |column: &[u8; 32]| *column.as_chunks().0.get(half).unwrap();
            tile.set_codes(0, &codes.iter().map(of_tile).collect::<Vec<_>>());
        }
        let (view, table) = (layer.view(), WindowTable::of(width).entries());
        let mut tiles = [0, 1].map(|_| vec![[0; ROWS]; codes.len()]);
        let group = &view.layout().groups()[0];
        tiles.iter_mut().enumerate().for_each(|(tile, columns)| view.codes(tile, group, columns));
        for (col, codes) in codes.iter().enumerate() {
            let expected = windows_by_row(codes, bits.into()).into_iter().map(|w| table[usize::from(w)]);
            let found = tiles[0][col].iter().chain(&tiles[1][col]);
            prop_assert!(expected.eq(found.copied()), "column {}", col);
        }
    }

    #[test]
    fn codes_pack_and_unpack_to_themselves(
        bits in 1u8..=8,
        cols in 1usize..97,
        seed in any::<[u8; 32]>(),
    ) {
        let group_size = cols.next_multiple_of(UNIT_COLS);
        let mut layer = PackedLayer::zeroed(layout(16, cols, group_size, TWO_LEVEL, &[bits]));
        let codes: Vec<CodeColumn> = (0..cols)
            .map(|c| std::array::from_fn(|r| {
                seed[(c * 7 + r * 3) % 32].wrapping_mul(c as u8 | 1).wrapping_add(r as u8) >> (8 - bits)
            }))
            .collect();
        layer.tiles_mut()[0].set_codes(0, &codes);
        let mut unpacked = vec![[9; ROWS]; cols];
        let view = layer.view();
        let group = &view.layout().groups()[0];
        view.codes(0, group, &mut unpacked);
        prop_assert_eq!(&unpacked, &codes);
        // Columns that are only stored are zero.
        unpacked.resize(group_size, [9; ROWS]);
        view.codes(0, group, &mut unpacked);
        prop_assert_eq!(&unpacked[..cols], &codes);
        prop_assert!(unpacked[cols..].iter().flatten().all(|&code| code == 0));
    }

    #[test]
    fn two_level_codes_are_read_back(
        scale_bits in prop_oneof![Just(4u8), Just(6u8)],
        s in any::<CodeColumn>(),
        z in any::<CodeColumn>(),
    ) {
        let mask = u8::MAX >> (8 - scale_bits);
        let (s, z) = (s.map(|s| s & mask), z.map(|z| z & mask));
        let coding = ScaleCoding::TwoLevel { sub_group: 16, scale_bits };
        let mut layer = PackedLayer::zeroed(layout(16, 48, 48, coding, &[2]));
        layer.tiles_mut()[0].set_two_level(0, 1, &s, &z);
        let view = layer.view();
        let group = &view.layout().groups()[0];
        prop_assert_eq!(view.scales(0, group, 1), (s.map(f32::from), z.map(|z| -f32::from(z))));
        prop_assert_eq!(view.scales(0, group, 0), ([0.0; ROWS], [0.0; ROWS].map(|z: f32| -z)));
    }
}
