// What a warp multiplies of a strip, a tile or two of a trellis: 1 to 8 tokens with its share of
// the columns. One instruction serves 8 tokens.
#pragma once

#include "matvec.cuh"

// The inputs of a lane for one step: the columns of its unit, for the token whose sums it feeds.
struct Inputs {
    Vector16 half[2];  // words 2i, 2i + 1 of half h are b0, b1 of product 2h + i

    __device__ void load(const u16* unit) {
        half[0] = load16(unit);
        half[1] = load16(unit + 8);
    }
};

// All inputs, and where those of the lane's token start. Lanes past the last token take its inputs:
// their sums are never looked at.
struct LaneInputs {
    const u16* values;
    u32 lane;
};

template <class Matrix>
__device__ inline LaneInputs inputs_of_lane(const Matvec<Matrix>& args) {
    return {args.x, min(threadIdx.x % WARP / 4, args.m - 1) * args.x_stride};
}

// The sums of a lane: rows 2g, 2g + 1 of a tile times tokens 2q, 2q + 1. Products are added to one
// and to the other by turns: each has to wait for the one before it.
typedef float LaneSums[2][4];

// sums += product t of a unit; `inputs`: the lane's at its columns.
__device__ inline void multiply_operands(LaneSums& sums, const u32 (&a)[4], const Inputs& inputs, u32 t) {
    const Vector16& b = inputs.half[t / 2];
    mma_16x8x16(sums[t % 2], a[0], a[1], a[2], a[3], b.word[t % 2 * 2], b.word[t % 2 * 2 + 1]);
}

// sums += a unit of a tile.
template <int WIDTH>
__device__ inline void multiply_unit(LaneSums& sums, const Unit<WIDTH>& codes, const Factors& scales, const Inputs& inputs) {
#pragma unroll
    for (u32 t = 0; t < 4; ++t) {
        u32 a[4];
        operands(a, codes, scales, t);
        multiply_operands(sums, a, inputs, t);
    }
}

template <int WIDTH>
__device__ inline void multiply_units(LaneSums (&sums)[1], const Unit<WIDTH> (&codes)[1], const Factors (&scales)[1], const Inputs& inputs) {
    multiply_unit(sums[0], codes[0], scales[0], inputs);
}

// sums += a unit of a strip of a trellis.
template <int WIDTH>
__device__ inline void multiply_units(LaneSums (&sums)[STRIP_TILES], const Unit<WIDTH> (&codes)[STRIP_TILES],
                                      const Factors (&scales)[STRIP_TILES], const Inputs& inputs) {
    if constexpr (WIDTH >= GRID_WIDTH) {
        for (u32 tile = 0; tile < STRIP_TILES; ++tile) multiply_unit(sums[tile], codes[tile], scales[tile], inputs);
    } else {
        const Ring<WIDTH> ring(codes);
#pragma unroll
        for (u32 p = 0; p < 2; ++p)
#pragma unroll
            for (u32 tile = 0; tile < STRIP_TILES; ++tile) {
                u32 entries[2][2];
                for (u32 r = 0; r < 2; ++r) ring.load_entries(entries[r], tile, r, p);
                for (u32 upper = 0; upper < 2; ++upper) {
                    u32 a[4];
                    operands(a, entries, scales[tile], upper);
                    multiply_operands(sums[tile], a, inputs, p + 2 * upper);
                }
            }
    }
}

// ---- a tile of plain items ----

// A scale record of a plain layer, of all rows of a tile.
template <class Matrix>
constexpr u32 PLAIN_RECORD_BYTES = TILE_ROWS;
template <>
constexpr u32 PLAIN_RECORD_BYTES<TrellisMatrix> = TRELLIS_RECORD_BYTES;

// What a lane fetches of an item before its turn, so that memory is never waited for: its scale
// codes, and the words of its units where codes have up to 4 bits. Wider items keep memory busy by
// themselves.
struct Fetched {
    u32 scales;
    u32 word[4][2];  // of 4 bits [2 * unit + t / 2][row]; else of 2 bits [unit][row] and of 1 bit [2][row]
};

// Where a lane finds its units, `PER_LANE` of each item: rows 2g, 2g + 1, columns 16 * PER_LANE * q
// ..
template <u32 PER_LANE>
struct PlainTile {
    const u8* codes;   // of the tile
    const u8* scales;  // of the lane's rows and first unit
    u32 first_unit;

    template <class Matrix>
    __device__ void find(const Matrix& w, u32 tile) {
        const u32 lane = threadIdx.x % WARP;
        first_unit = PER_LANE * (lane % 4);
        codes = w.codes + u64(tile) * w.tile_code_bytes;
        const u32 run = (first_unit * UNIT_COLS) >> w.sub_group_log2;
        scales = w.scales + u64(tile) * w.tile_scale_bytes + run * PLAIN_RECORD_BYTES<Matrix> + lane / 4 * 2 % PLAIN_RECORD_BYTES<Matrix>;
    }

    __device__ u32 unit_of_group(const Item& item) const { return item.start16 + first_unit; }

    __device__ void fetch(Fetched& fetched, const Item& item) const {
        fetched.scales = *reinterpret_cast<const u16*>(scales + item.scales);
        if (item.width > 4) return;
        // Offsets of 32 bits as long as they are added up, which takes half the instructions.
        const u32 unit = unit_of_group(item), row = item.codes + threadIdx.x % WARP / 4 * 8;
        if (item.width == 4) {
            const u8* four = codes + (row + 2 * BLOCK_BYTES * unit);
#pragma unroll
            for (u32 i = 0; i < 2 * PER_LANE; ++i) load_pair(fetched.word[i], four + BLOCK_BYTES * i);
            return;
        }
        if (item.width & 2) {
            const u8* two = codes + (row + BLOCK_BYTES * unit);
#pragma unroll
            for (u32 i = 0; i < PER_LANE; ++i) load_pair(fetched.word[i], two + BLOCK_BYTES * i);
        }
        if (item.width & 1) load_pair(fetched.word[2], codes + (row + (item.width & 2) * (BLOCK_BYTES / 2) * item.group16 + BLOCK_BYTES * (unit / 2)));
    }
};

// The lane's unit number `i` of an item, from what was fetched, or else from where the item's entry
// says.
template <int WIDTH, u32 PER_LANE>
__device__ inline Unit<WIDTH> take_unit(const PlainTile<PER_LANE>& tile, const Fetched& fetched, const Item* entry, u32 i) {
    Unit<WIDTH> unit = {};
    if (WIDTH > 4) {
        const Item item = *entry;
        unit.load(GroupPlanes{tile.codes + item.codes, item.group16}, tile.unit_of_group(item) + i);
    } else {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            unit.four[0][r] = fetched.word[2 * i][r];
            unit.four[1][r] = fetched.word[2 * i + 1][r];
            unit.two[r] = fetched.word[i][r];
            unit.one[r] = fetched.word[2][r] >> (PER_LANE == 2 ? 4 * i : tile.first_unit % 2 * 4);
        }
    }
    return unit;
}

// Of the scale codes that a lane fetched for its two rows.
template <int WIDTH>
__device__ inline Factors plain_factors(const PackedMatrix&, u32 fetched, const RowScales& rows) {
    return two_level_factors<false>(fetched, 0, rows);
}
template <int WIDTH>
__device__ inline Factors plain_factors(const TrellisMatrix&, u32 fetched, const RowScales& rows) {
    return trellis_factors(fetched, WIDTH, rows);
}

// What a lane has of the tiles of a strip.
template <u32 PER_LANE, u32 TILES>
struct PlainStrip {
    PlainTile<PER_LANE> tile[TILES];
    RowScales rows[TILES];
};

template <int WIDTH, u32 PER_LANE, u32 TILES, class Matrix>
__device__ inline void multiply_plain_item(LaneSums (&sums)[TILES], const Matrix& w, const PlainStrip<PER_LANE, TILES>& strip,
                                           const Fetched (&fetched)[TILES], const Item* entry, const u16* x) {
    Factors scales[TILES];
    for (u32 tile = 0; tile < TILES; ++tile) scales[tile] = plain_factors<WIDTH>(w, fetched[tile].scales, strip.rows[tile]);
#pragma unroll
    for (u32 i = 0; i < PER_LANE; ++i) {
        Inputs inputs;
        inputs.load(x + i * UNIT_COLS);
        Unit<WIDTH> units[TILES];
        for (u32 tile = 0; tile < TILES; ++tile) units[tile] = take_unit<WIDTH>(strip.tile[tile], fetched[tile], entry, i);
        multiply_units(sums, units, scales, inputs);
    }
}

template <u32 PER_LANE, u32 TILES, class Matrix>
__device__ inline void multiply_plain_strip(LaneSums (&sums)[TILES], const Matrix& w, u32 first_tile, const LaneInputs& x, u32 first, u32 stride) {
    PlainStrip<PER_LANE, TILES> strip;
    for (u32 tile = 0; tile < TILES; ++tile) {
        strip.tile[tile].find(w, first_tile + tile);
        strip.rows[tile] = row_scales_of(w, first_tile + tile);
    }
    const u32 last = w.item_count - 1;
    // Whole words, or else the compiler carries every field on by itself.
    const auto entry = [&](u32 i) { return load16(w.items + min(i, last)); };
    Vector16 next = entry(first), after = entry(first + stride);
    Fetched fetched[TILES] = {};
    for (u32 tile = 0; tile < TILES; ++tile) strip.tile[tile].fetch(fetched[tile], item_of(next));
    wait_for_previous_kernel();
    for (u32 i = first; i <= last; i += stride) {
        const Item item = item_of(next);
        Fetched here[TILES];
        for (u32 tile = 0; tile < TILES; ++tile) here[tile] = fetched[tile];
        next = after;
        // Past the end the last is fetched once more.
        for (u32 tile = 0; tile < TILES; ++tile) strip.tile[tile].fetch(fetched[tile], item_of(next));
        after = entry(i + 2 * stride);
        const u16* inputs = x.values + (x.lane + (item.col16 + strip.tile[0].first_unit) * UNIT_COLS);
        FOR_WIDTH(item.width, multiply_plain_item, sums, w, strip, here, w.items + i, inputs);
    }
}

// ---- a tile of any items ----

template <int WIDTH, u32 TILES, class Matrix>
__device__ inline void multiply_item(LaneSums (&sums)[TILES], const Matrix& w, u32 first_tile, const Item& item, const RowScales (&rows)[TILES],
                                     const LaneInputs& x) {
    const u32 per_lane = lane_units(item.units);
    for (u32 i = 0; i < per_lane; ++i) {
        const u32 unit = per_lane * (threadIdx.x % 4) + i;
        Factors scales[TILES] = {};
        Unit<WIDTH> codes[TILES] = {};
        Inputs inputs = {};
        if (unit < item.units) {
            for (u32 tile = 0; tile < TILES; ++tile) {
                const u8* records = w.scales + u64(first_tile + tile) * w.tile_scale_bytes + item.scales;
                scales[tile] = factors_of(w, item, records, unit, rows[tile]);
                codes[tile].load(GroupPlanes{w.codes + u64(first_tile + tile) * w.tile_code_bytes + item.codes, item.group16}, item.start16 + unit);
            }
            inputs.load(x.values + (x.lane + (item.col16 + unit) * UNIT_COLS));
        }
        multiply_units(sums, codes, scales, inputs);
    }
}

// ---- the share of a warp ----

// sums += the items `first`, `first + stride`, ... of a strip.
template <u32 TILES, class Matrix>
__device__ inline void multiply_strip(LaneSums (&sums)[TILES], const Matrix& w, u32 strip, const LaneInputs& x, u32 first, u32 stride) {
    const u32 first_tile = TILES * strip;
    switch (w.plain_units) {
        case 8: return multiply_plain_strip<2>(sums, w, first_tile, x, first, stride);
        case 4: return multiply_plain_strip<1>(sums, w, first_tile, x, first, stride);
    }
    RowScales rows[TILES];
    for (u32 tile = 0; tile < TILES; ++tile) rows[tile] = row_scales_of(w, first_tile + tile);
    wait_for_previous_kernel();
    for (u32 i = first; i < w.item_count; i += stride) {
        const Item item = w.items[i];
        FOR_WIDTH(item.width, multiply_item, sums, w, first_tile, item, rows, x);
    }
}

__device__ inline void multiply_strip(LaneSums (&sums)[1], const DenseMatrix& w, u32 tile, const LaneInputs& x, u32 first, u32 stride) {
    wait_for_previous_kernel();
    for (u32 step = first; step < w.steps; step += stride) {
        Vector16 a[4];
#pragma unroll
        for (u32 t = 0; t < 4; ++t) a[t] = fragment(w, tile, step, t);
        Inputs inputs;
        inputs.load(x.values + (x.lane + step * STEP_COLS + threadIdx.x % 4 * UNIT_COLS));
#pragma unroll
        for (u32 t = 0; t < 4; ++t) multiply_operands(sums[0], a[t].word, inputs, t);
    }
}
