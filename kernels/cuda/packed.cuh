// A SliM layer as it lies in the file (docs/format.md), and how a warp turns it into operands of a
// matrix product.
//
//   tile (16 rows) = groups of columns; a group = planes of 8, 4, 2, 1 bits; a plane = 64-byte
//   blocks, a word per row
//
// A warp takes an *item*, up to 128 columns of one group, in one or two *steps*. In a step lane (g,
// q) = (lane / 4, lane % 4) holds rows 2g and 2g + 1 of one *unit* of 16 columns: of the 2-bit
// plane that is one aligned 8-byte load. Four products of 16 x 16 x tokens then use up the step:
// product t takes columns 4t .. 4t + 3 of every lane's unit. Row g of the product is row 2g of the
// tile, row g + 8 is row 2g + 1. Lane q takes units `lane_units * q` and the next, which share
// their scales unless sub-groups have 16 columns.
//
// A code is used as the fp16 number with the same bits, the subnormal code * 2^-24: no conversion,
// one fma per two weights:
//   operand = code * (factor * 2^E) + offset * 2^(E - 24),  weight = unit * 2^(24 - E) * operand
// with the row's unit (docs/kernels.md) such that nothing leaves the range of fp16.
#pragma once

#include "primitives.cuh"

constexpr int TILE_ROWS = 16;
constexpr int UNIT_COLS = 16;
constexpr int STEP_COLS = 64;
constexpr int ITEM_COLS = 128;

enum Coding : u32 { PAPER = 0, TWO_LEVEL_4 = 1, TWO_LEVEL_6 = 2, TRELLIS = 3 };

// Up to ITEM_COLS columns of a group, never of two.
struct alignas(16) Item {
    u32 codes;    // offset of the group's codes in a tile, bytes
    u32 scales;   // offset of the item's first scale record in a tile, bytes
    u16 col16;    // first column / 16
    u16 start16;  // first column within the group / 16, a multiple of 8
    u16 group16;  // columns of the group / 16
    u8 width;     // bits per code
    u8 units;     // columns of the item / 16, 1 to 8
};

// A quarter: 64 columns of a group. Four of one width are a *quad*, what a warp of `matvec_raw`
// takes at a time.
struct alignas(16) Quarter {
    u32 codes;       // offset of its codes of the first plane in a tile, bytes
    u32 plane_step;  // from there to those of the second plane; to those of a third it is half as far again
    u32 scales;      // offset of its first scale record in a tile, bytes
    u16 col64;       // first column / 64
    u16 width;       // bits per code; 0: it only fills up a quad, and has the column behind the last
};

// A packed layer in device memory. `codes`, `scales`, `row_scales` are the file's tensors, 16-byte
// aligned and readable for 16 bytes past their ends.
struct PackedMatrix {
    const u8* codes;        // [tiles, tile_code_bytes]
    const u8* scales;       // [tiles, tile_scale_bytes]
    const u16* row_scales;  // fp16 [tiles, 2, 16], of a trellis [tiles, 16]; unused by the paper coding
    const float* units;     // [tiles * 16]
    const u16* row_factors; // fp16 [tiles * 16, 2]: `RowScales`; unused by the paper coding
    const Item* items;      // [item_count], in column order
    const Quarter* quads;   // [quad_count + 1][4], the widest first; the last one has nothing
    u32 rows;
    u32 cols;
    u32 item_count;
    u32 tile_code_bytes;
    u32 tile_scale_bytes;
    u32 coding;          // Coding
    u32 sub_group_log2;  // two-level and trellis: log2 of the columns of a sub-group
    u32 max_width;       // the largest width of an item
    u32 plain_units;     // of all items, if they are *plain*, or 0: 4-bit scale codes for 32 columns or more; 8 units, or 4
    u32 quad_count;      // 0: raw codes will not do (`matrix.rs`)
};

// An entry of the table that was loaded whole.
__device__ inline Item item_of(const Vector16& words) {
    Item item;
    item.codes = words.word[0];
    item.scales = words.word[1];
    item.col16 = u16(words.word[2]);
    item.start16 = u16(words.word[2] >> 16);
    item.group16 = u16(words.word[3]);
    item.width = u8(words.word[3] >> 16);
    item.units = u8(words.word[3] >> 24);
    return item;
}

__device__ inline u32 lane_units(u32 units) { return (units + 3) / 4; }

// ---- scales ----

__device__ inline u32 record_bytes(u32 coding, u32 width) {
    if (coding == TWO_LEVEL_4) return 16;
    if (coding == TWO_LEVEL_6) return 24;
    if (coding == TRELLIS) return 8;
    return width == 1 ? 64 : 32 + 2 * width;
}

// What a scale record says about one row, before the row scales: weight = (d * factor) * code + m *
// offset.
struct StoredScale {
    float factor;
    float offset;
};

__device__ inline float half_at(const u8* bytes) { return half_to_float(u16(bytes[0] | bytes[1] << 8)); }

// F16 and F17.
__device__ inline StoredScale paper_scale(const u8* record, u32 width, u32 row) {
    const float scale = half_at(record + 2 * row);
    const u8* after = record + 2 * TILE_ROWS;
    if (width == 1) return {2.0f * scale, half_at(after + 2 * row) - scale};
    const u32 bit = row * width;
    // The second byte may be past the last zero point; it is readable.
    const u32 word = after[bit / 8] | after[bit / 8 + 1] << 8;
    return {scale, -rounded_product(scale, float(word >> (bit % 8) & ((1u << width) - 1)))};
}

// 2^E of the formula above, as large as the largest factor allows: 15 or 63 scale codes, or 1 unit.
__device__ inline float factor_scale(u32 coding) {
    return coding == PAPER ? 32768.0f : coding == TWO_LEVEL_6 ? 512.0f : 2048.0f;
}
constexpr float CODE_SCALE = 16777216.0f;
__device__ inline float operand_unit(u32 coding) { return CODE_SCALE / factor_scale(coding); }

// A number that the row's unit keeps within the range of fp16.
__device__ inline u32 both_halves(float value) { return half2_from_small_floats(value, value); }

// 1 / power for a power of two, up to 2^126 either way.
__device__ inline float reciprocal_of_power(float power) { return float_from_bits(0x7f000000u - float_bits(power)); }

// What turns a lane's scale codes into `Factors`, for its two rows. Two-level, fp16 pairs: `d` =
// 2^15 * d / unit and `m` = -2^-9 * m / unit. A code's bits, put just below the leading bit of 1,
// make 1 + code / 2^(code's bits), and an fma of that, the row's number and its opposite the wanted
// product. Paper: `d` = 2^E / unit, the bits of an f32.
struct RowScales {
    u32 d[2];
    u32 m[2];
};

__device__ inline RowScales row_scales_of(const PackedMatrix& w, u32 tile) {
    const u32 row = tile * TILE_ROWS + threadIdx.x % WARP / 4 * 2;
    RowScales scales = {};
    if (w.coding == PAPER) {
        for (u32 r = 0; r < 2; ++r) scales.d[r] = float_bits(factor_scale(PAPER) * reciprocal_of_power(w.units[row + r]));
        return scales;
    }
    const u64 rows = *reinterpret_cast<const u64*>(w.row_factors + u64(row) * 2);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        scales.d[r] = permute_bytes(u32(rows >> 32 * r), 0, 0x1010);
        scales.m[r] = permute_bytes(u32(rows >> 32 * r), 0, 0x3232);
    }
    return scales;
}

// The factors and offsets of a lane's two rows for a unit, fp16 pairs with the same number in both
// halves.
struct Factors {
    u32 factor[2];
    u32 offset[2];
};

// `low`: the bytes of both rows in a record of 4-bit scale codes, or the first part of one of 6-bit
// codes; `high`: their other bits.
template <bool HAS_HIGH_BITS>
__device__ inline Factors two_level_factors(u32 low, u32 high, const RowScales& rows) {
    Factors out;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        // Byte r in both halves.
        const u32 both = r == 0 ? 0x4040 : 0x4141;
        const u32 codes = permute_bytes(low, 0, both);
        u32 s, z;
        if (HAS_HIGH_BITS) {
            const u32 upper = permute_bytes(high, 0, both);
            s = 0x3c003c00u | (codes & 0x000f000f) << 4 | (upper & 0x00030003) << 8;
            z = 0x3c003c00u | (codes & 0x00f000f0) | (upper & 0x000c000c) << 6;
        } else {
            s = 0x3c003c00u | (codes & 0x000f000f) << 6;
            z = 0x3c003c00u | (codes & 0x00f000f0) << 2;
        }
        out.factor[r] = half2_fma(s, rows.d[r], half2_negated(rows.d[r]));
        out.offset[r] = half2_fma(z, rows.m[r], half2_negated(rows.m[r]));
    }
    return out;
}

// `records`: the item's scale records.
__device__ inline Factors factors_of(const PackedMatrix& w, const Item& item, const u8* records, u32 unit, const RowScales& rows) {
    const u32 row = threadIdx.x % WARP / 4 * 2;
    if (w.coding == PAPER) {
        Factors out;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const StoredScale scale = paper_scale(records, item.width, row + r);
            out.factor[r] = both_halves(scale.factor * float_from_bits(rows.d[r]));
            out.offset[r] = both_halves(scale.offset * float_from_bits(rows.d[r]) * (1.0f / CODE_SCALE));
        }
        return out;
    }
    const u8* record = records + ((unit * UNIT_COLS) >> w.sub_group_log2) * record_bytes(w.coding, item.width);
    const auto pair_at = [record](u32 at) { return u32(*reinterpret_cast<const u16*>(record + at)); };
    if (w.coding == TWO_LEVEL_4) return two_level_factors<false>(pair_at(row), 0, rows);
    return two_level_factors<true>(pair_at(row), pair_at(TILE_ROWS + row % 8) >> (4 * (row / 8)), rows);
}

// ---- codes ----

// Where a code of product t lies in the halves of a register when it is used: at bit `place`, as
// far as an fp16 number's 10 bits have room, for that saves shifts. The factor it is multiplied
// with is 2^-place times the unit's.
template <int WIDTH>
__device__ constexpr u32 place(u32 t) {
    return WIDTH == 1 ? t : WIDTH == 2 || WIDTH == 3 ? 2 * t : WIDTH >= 4 && WIDTH <= 6 ? t % 2 * 4 : 0;
}

constexpr u32 BLOCK_BYTES = 4 * TILE_ROWS;

// The words of rows 2g and 2g + 1 of a block, from that of row 2g on.
__device__ inline void load_pair(u32 (&words)[2], const u8* row) {
    const u64 both = *reinterpret_cast<const u64*>(row);
    words[0] = u32(both);
    words[1] = u32(both >> 32);
}

// The planes of a group of so many units, as they lie in the file.
struct GroupPlanes {
    const u8* group;
    u32 units;

    __device__ const u8* plane(u32 bits_before) const { return group + 2 * bits_before * UNIT_COLS * units; }

    // Whether the unit is the last block of a 1-bit plane, with 2 bytes per row (F13).
    __device__ bool is_short(u32 unit) const { return unit % 2 == 0 && unit + 1 == units; }

    // The lane's words of a block of the plane of BITS bits, behind planes of `bits_before` bits in
    // all.
    template <u32 BITS>
    __device__ void load_rows(u32 (&words)[2], u32 bits_before, u32 block) const {
        load_pair(words, plane(bits_before) + BLOCK_BYTES * block + threadIdx.x % WARP / 4 * 8);
    }
};

// A lane's words of a unit. Planes that WIDTH lacks are never read.
template <int WIDTH>
struct Unit {
    u32 eight[4][2];  // [t][row]
    u32 four[2][2];   // [t / 2][row]
    u32 two[2];
    u32 one[2];

    // Unit number `unit` of `planes`.
    template <class Planes>
    __device__ void load(const Planes& planes, u32 unit) {
        if (WIDTH & 8) {
#pragma unroll
            for (u32 t = 0; t < 4; ++t) planes.template load_rows<8>(eight[t], 0, 4 * unit + t);
        }
        if (WIDTH & 4) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) planes.template load_rows<4>(four[i], WIDTH & 8, 2 * unit + i);
        }
        if (WIDTH & 2) planes.template load_rows<2>(two, WIDTH & 12, unit);
        if (WIDTH & 1) {
            if (planes.is_short(unit)) {
                const u8* row = planes.plane(WIDTH & 14) + BLOCK_BYTES / 2 * unit + threadIdx.x % WARP / 4 * 4;
                const u32 halves = *reinterpret_cast<const u32*>(row);
                one[0] = spread(halves & 0xffff);
                one[1] = spread(halves >> 16);
            } else {
                planes.template load_rows<1>(one, WIDTH & 14, unit / 2);
                one[0] >>= 4 * (unit % 2);
                one[1] >>= 4 * (unit % 2);
            }
        }
    }

    // Two codes of row 2g + r, times 2^place: columns 4t + odd and 4t + odd + 2 of the unit.
    __device__ u32 codes(u32 t, u32 r, u32 odd) const {
        if (WIDTH == 8) return eight[t][r] >> (8 * odd) & 0x00ff00ff;
        u32 low = place<WIDTH>(t), value = 0;
        // The upper byte's codes come down first: one shift for all products.
        if (WIDTH & 4) {
            value = shifted(four[t / 2][r] >> (8 * odd), int(low) - int(t % 2 * 4)) & (0x000f000fu << low);
            low += 4;
        }
        if (WIDTH & 2) {
            value |= shifted(two[r] >> (8 * odd), int(low) - int(2 * t)) & (0x00030003u << low);
            low += 2;
        }
        if (WIDTH & 1) value |= shifted(one[r], int(low) - int(8 * odd + t)) & (0x00010001u << low);
        return value;
    }

private:
    // 16 bits of a short block as the low half of a whole block's word.
    __device__ static u32 spread(u32 half) {
        half = (half | half << 8) & 0x00ff00ff;
        return (half | half << 4) & 0x0f0f0f0f;
    }

    __device__ static u32 shifted(u32 word, int left) { return left >= 0 ? word << left : word >> -left; }
};

// Operands of product t: a[0], a[2] of row 2g, a[1], a[3] of row 2g + 1.
template <int WIDTH>
__device__ inline void operands(u32 (&a)[4], const Unit<WIDTH>& unit, const Factors& scales, u32 t) {
    u32 factor[2] = {scales.factor[0], scales.factor[1]};
    if (place<WIDTH>(t) > 0) {
        // 2^-place in both halves: an exponent of 15 - place.
#pragma unroll
        for (u32 r = 0; r < 2; ++r) factor[r] = half2_fma(factor[r], (15 - place<WIDTH>(t)) * 0x04000400u, 0);
    }
#pragma unroll
    for (u32 k = 0; k < 4; ++k) a[k] = half2_fma(unit.codes(t, k % 2, k / 2), factor[k % 2], scales.offset[k % 2]);
}

// Calls `body<WIDTH>(...)` for a width known at run time.
#define FOR_WIDTH(width, body, ...)                \
    switch (width) {                               \
        case 1: body<1>(__VA_ARGS__); break;       \
        case 2: body<2>(__VA_ARGS__); break;       \
        case 3: body<3>(__VA_ARGS__); break;       \
        case 4: body<4>(__VA_ARGS__); break;       \
        case 5: body<5>(__VA_ARGS__); break;       \
        case 6: body<6>(__VA_ARGS__); break;       \
        case 7: body<7>(__VA_ARGS__); break;       \
        default: body<8>(__VA_ARGS__);             \
    }
