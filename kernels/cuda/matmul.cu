// Products of many tokens with the bands of one matrix: out[t, row] = sum over columns of w[row,
// col] * x[t, col].
//
// A block computes 128 rows (8 tiles) of a band x 128 tokens. Its warps form two *sets* of four,
// which take the matrix's items (up to 128 columns; of dense ones 64) in turn and add up their sums
// at the end. So a warp has 64 rows x 64 tokens: half of its registers are sums, and operands, once
// read or made of codes, serve 8 products. A set brings its next item to shared memory while it
// works on one, and does not wait for the other: while one turns scales and codes into operands,
// the other has products under way. Packed weights never exist in fp16 outside registers.
//
//   x    fp16 [m, x_stride], operand order; padding zero
//   out  f32 [m, matrix_rows]: overwritten (STORE) or added to, times scale (ADD)
//
// Grid: (sum over the bands of ceil(tiles / 8), ceil(m / 128)). Block: MATMUL_THREADS. Dynamic
// shared memory: HEAD_BYTES + the larger of SUMS_BYTES and stages * (packed: INPUT_BYTES<128> + 8 *
// slot_bytes(largest max_width); dense: INPUT_BYTES<64> + 8 * FRAGMENT_BYTES).

#include "bands.cuh"
#include "slot.cuh"

constexpr u32 MATMUL_TILES = 8;
constexpr u32 MATMUL_TOKENS = 128;
// Sets of warps, as `launch.rs` counts them, too, and warps of a set. A multiprocessor has room for
// two sets: of one block, which makes do with half as many blocks, or of two.
constexpr u32 SETS = 2;
constexpr u32 SET_WARPS = 4;
constexpr u32 SET_THREADS = SET_WARPS * WARP;
constexpr u32 MATMUL_THREADS = SETS * SET_THREADS;
constexpr u32 MATMUL_BLOCKS = 2 / SETS;
// A warp's share: tiles, and blocks of 8 tokens.
constexpr u32 WARP_TILES = 4;
constexpr u32 WARP_TOKEN_BLOCKS = 8;
constexpr u32 WARP_TOKENS = 8 * WARP_TOKEN_BLOCKS;

template <class Matrix>
struct Matmul {
    Band<Matrix> band[MAX_BANDS];
    const u16* x;
    u32 x_stride;
    u32 m;
    u32 mode;    // STORE or ADD
    u32 stages;  // items in shared memory at a time: two for each set; one for each; 1, and one set does all the work
    u32 bands;
    float scale;
};
typedef Matmul<PackedMatrix> MatmulPacked;
typedef Matmul<TrellisMatrix> MatmulTrellis;
typedef Matmul<DenseMatrix> MatmulDense;

// What a block works on, in shared memory: its registers are full of sums.
template <class Matrix>
struct BlockWork {
    Band<Matrix> band;
    u32 first_tile;

    // By all threads.
    __device__ void find(const Matmul<Matrix>& args) {
        if (threadIdx.x == 0) {
            u32 i = 0, tile = blockIdx.x * MATMUL_TILES;
            const auto tiles_before_next = [&] { return (tiles_of(args.band[i].w) + MATMUL_TILES - 1) / MATMUL_TILES * MATMUL_TILES; };
            for (; i + 1 < args.bands && tile >= tiles_before_next(); ++i) tile -= tiles_before_next();
            band = args.band[i];
            first_tile = tile;
        }
        __syncthreads();
    }
};

// Shared memory begins with the block's work, the table's entries of items under way (number i at i
// % ENTRIES: a set has up to three, two apart) and the row scales of the block's tiles, which the
// lanes 4g .. 4g + 3 share.
constexpr u32 WORK_BYTES = 128;
constexpr u32 ENTRIES = 8;
constexpr u32 ROWS_AT = WORK_BYTES + ENTRIES * sizeof(Item);
constexpr u32 HEAD_BYTES = ROWS_AT + MATMUL_TILES * TILE_ROWS / 2 * sizeof(RowScales);
static_assert(sizeof(BlockWork<PackedMatrix>) <= WORK_BYTES && sizeof(BlockWork<DenseMatrix>) <= WORK_BYTES, "");

// What a warp does of the block's work, and the lane's part of that (lane = 4g + q).
struct Share {
    u32 set;
    u32 warp;  // of the set
    u32 first_tile, first_token;
    u32 lane, g, q;

    __device__ Share() {
        set = threadIdx.x / SET_THREADS;
        warp = threadIdx.x / WARP % SET_WARPS;
        first_tile = warp / 2 * WARP_TILES;
        first_token = warp % 2 * WARP_TOKENS;
        lane = threadIdx.x % WARP;
        g = lane / 4;
        q = lane % 4;
    }
};

// ---- inputs in shared memory ----

// A row of chunks of 16 bytes for each token, of items of COLS columns.
template <u32 COLS>
constexpr u32 INPUT_BYTES = MATMUL_TOKENS * 2 * COLS;

// Where chunk `chunk` of token `token` lies: so swapped, the 8 lanes that read at a time (two
// tokens, q = 0..3) find theirs in all 32 banks.
template <u32 COLS>
__device__ inline u32 input_offset(u32 token, u32 chunk) {
    return token * 2 * COLS + (chunk ^ (token & 1) ^ (chunk >> 3 << 1)) * 16;
}

// Starts to copy `units` units of inputs from column `col` on, by the threads of a set. Tokens past
// the last repeat it: their sums are not stored. What lanes without a unit read is zero.
template <u32 COLS>
__device__ inline void copy_inputs(const u16* x, u32 x_stride, u32 m, u32 col, u32 units, u8* to) {
    constexpr u32 CHUNKS = COLS / 8, STRIDE = SET_THREADS / CHUNKS;
    const u32 chunk = threadIdx.x % CHUNKS, first = threadIdx.x % SET_THREADS / CHUNKS;
    const u32 token = blockIdx.y * MATMUL_TOKENS + first, stride_bytes = x_stride * sizeof(u16);
    const u8* from = reinterpret_cast<const u8*>(x + col + chunk * 8);
    to += input_offset<COLS>(first, chunk);
    if (chunk < 2 * units) {
#pragma unroll
        for (u32 i = 0; i < MATMUL_TOKENS / STRIDE; ++i)
            copy16_async(to + i * STRIDE * 2 * COLS, from + u64(min(token + i * STRIDE, m - 1)) * stride_bytes);
    } else if (chunk < 8 * lane_units(units)) {
#pragma unroll 1
        for (u32 i = 0; i < MATMUL_TOKENS / STRIDE; ++i) *reinterpret_cast<Vector16*>(to + i * STRIDE * 2 * COLS) = {};
    }
}

// ---- products ----

typedef float Sums[WARP_TILES][WARP_TOKEN_BLOCKS][4];

// sums += operands `a` of two products, times the inputs `b` of the warp's tokens 8n .. 8n + 7.
__device__ inline void multiply_block(Sums& sums, const u32 (&a)[WARP_TILES][2][4], const Vector16& b, u32 n) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 tile = 0; tile < WARP_TILES; ++tile)
            mma_16x8x16(sums[tile][n], a[tile][i][0], a[tile][i][1], a[tile][i][2], a[tile][i][3], b.word[2 * i], b.word[2 * i + 1]);
}

// sums += two products, times the inputs of all the warp's tokens in a chunk; `inputs` are the
// lane's first.
template <u32 COLS>
__device__ inline void multiply_chunk(Sums& sums, const u32 (&a)[WARP_TILES][2][4], const u8* inputs) {
#pragma unroll
    for (u32 n = 0; n < WARP_TOKEN_BLOCKS; ++n) multiply_block(sums, a, load16(inputs + n * 8 * 2 * COLS), n);
}

// The same for one product of a chunk and the same one of another.
template <u32 COLS>
__device__ inline void multiply_two_chunks(Sums& sums, const u32 (&a)[WARP_TILES][2][4], const u8* first, const u8* second) {
#pragma unroll
    for (u32 n = 0; n < WARP_TOKEN_BLOCKS; ++n) {
        u32 b[2][2];
        load_pair(b[0], first + n * 8 * 2 * COLS);
        load_pair(b[1], second + n * 8 * 2 * COLS);
        multiply_block(sums, a, {{b[0][0], b[0][1], b[1][0], b[1][1]}}, n);
    }
}

__device__ inline u32 sets_at_work(u32 stages) { return min(stages, SETS); }

// Waits for the threads of a set. Barriers have their numbers in the instruction: one in a register
// would take all sixteen, and `racecheck` reports hazards behind it that are none
// (docs/kernels.md).
__device__ inline void sync_set(u32 set) {
    static_assert(SETS == 2, "a barrier for each set");
    if (set == 0) {
        sync_threads_of<1, SET_THREADS>();
    } else {
        sync_threads_of<2, SET_THREADS>();
    }
}

// Calls `multiply(i, stage)` for the items of a set, each after `copy(i, stage)` has brought it to
// shared memory.
template <class Copy, class Multiply>
__device__ inline void for_items_of_set(u32 set, u32 items, u32 stages, u8* shared, u32 stage_bytes, const Copy& copy, const Multiply& multiply) {
    const u32 sets = sets_at_work(stages), depth = stages / sets, ahead = (depth - 1) * sets;
    if (set >= sets) return;
    u8* stage = shared + set * depth * stage_bytes;
    u8* other = stage + (depth - 1) * stage_bytes;
    for (u32 next = set; next < items + ahead; next += sets) {
        copy_async_wait<0>();
        sync_set(set);  // the last item copied is there, and all have done with the one before
        if (next < items) copy(next, other);
        copy_async_commit();
        if (depth == 1) {
            copy_async_wait<0>();
            sync_set(set);
        }
        if (next >= set + ahead) multiply(next - ahead, stage);
        u8* const done = stage;
        stage = other;
        other = done;
    }
}

// ---- sums ----

// Sums of the block, f32 [tokens][SUM_PITCH], in the place of the stages. With this pitch the lanes
// of half a warp write 8 bytes each to all 32 banks.
constexpr u32 SUM_PITCH = MATMUL_TILES * TILE_ROWS + 4;
constexpr u32 SUMS_BYTES = MATMUL_TOKENS * SUM_PITCH * sizeof(float);

// Adds up the sets' sums, one after the other, and stores them: out[t, row].
template <class Matrix>
__device__ inline void store_sums(const Sums& sums, const Matmul<Matrix>& args, const BlockWork<Matrix>& block, const Share& share, float* total) {
#pragma unroll 1
    for (u32 set = 0; set < SETS; ++set) {
        __syncthreads();
        if (share.set != set) continue;
#pragma unroll
        for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
            for (u32 n = 0; n < WARP_TOKEN_BLOCKS; ++n)
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const u32 row = (share.first_tile + tile) * TILE_ROWS + 2 * share.g;
                    const u32 token = share.first_token + 8 * n + 2 * share.q + i;
                    Float2* to = reinterpret_cast<Float2*>(total + token * SUM_PITCH + row);
                    Float2 sum = {};
                    if (set > 0) sum = *to;
                    *to = {sum.value[0] + sums[tile][n][i], sum.value[1] + sums[tile][n][2 + i]};
                }
    }
    __syncthreads();
    const Band<Matrix>& band = block.band;
    const u32 row_of_block = threadIdx.x % (MATMUL_TILES * TILE_ROWS), row = block.first_tile * TILE_ROWS + row_of_block;
    if (row >= band.w.rows) return;
    constexpr u32 STRIDE = MATMUL_THREADS / (MATMUL_TILES * TILE_ROWS);
    const float unit = row_unit(band.w, row), bias = bias_of(band, row);
    const u32 first_token = blockIdx.y * MATMUL_TOKENS, tokens = min(args.m - first_token, MATMUL_TOKENS);
    float* out = band.out + u64(first_token) * band.matrix_rows + band.first_row + row;
#pragma unroll 8
    for (u32 token = threadIdx.x / (MATMUL_TILES * TILE_ROWS); token < tokens; token += STRIDE) {
        float* to = out + u64(token) * band.matrix_rows;
        const float value = total[token * SUM_PITCH + row_of_block] * unit + bias;
        *to = args.mode == ADD ? *to + args.scale * value : value;
    }
}

// ---- weights made of codes ----

// What a warp needs of an item in shared memory.
struct PackedItem {
    const Item* entry;
    const u8* inputs;
    const u8* slots;  // of the warp's first tile; the next follows after slot_size
    u32 slot_size;
    u32 first_tile;                          // of the band
    u32 last_tile;                           // tiles past it repeat it, their sums are not stored
    const RowScales (*rows)[TILE_ROWS / 2];  // of the warp's first tile; of the next after it
};

// The words of a unit of all of the warp's tiles.
template <int WIDTH, u32 UNITS>
__device__ inline void load_units(Unit<WIDTH> (&words)[WARP_TILES], const PackedItem& work, u32 unit) {
#pragma unroll
    for (u32 tile = 0; tile < WARP_TILES; ++tile) words[tile].load(SlotPlanes<UNITS>(work.slots + tile * work.slot_size, *work.entry), unit);
}

template <class Matrix>
__device__ inline void load_factors(Factors (&scales)[WARP_TILES], const Matrix& w, const PackedItem& work, u32 unit, u32 g) {
#pragma unroll
    for (u32 tile = 0; tile < WARP_TILES; ++tile) {
        const u8* records = records_of(w, min(work.first_tile + tile, work.last_tile), *work.entry, work.slots + tile * work.slot_size);
        scales[tile] = factors_of(w, *work.entry, records, unit, work.rows[tile][g]);
    }
}

// sums += a unit of all tiles. `inputs(chunk)`: the lane's of its two chunks.
template <int WIDTH, class Inputs>
__device__ inline void multiply_units(Sums& sums, const PackedMatrix&, const Unit<WIDTH> (&words)[WARP_TILES], const Factors (&scales)[WARP_TILES],
                                      const Inputs& inputs) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        u32 a[WARP_TILES][2][4];
#pragma unroll
        for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) operands(a[tile][i], words[tile], scales[tile], 2 * half + i);
        multiply_chunk<ITEM_COLS>(sums, a, inputs(half));
    }
}

template <int WIDTH, class Inputs>
__device__ inline void multiply_units(Sums& sums, const TrellisMatrix& w, const Unit<WIDTH> (&words)[WARP_TILES],
                                      const Factors (&scales)[WARP_TILES], const Inputs& inputs) {
    if constexpr (WIDTH >= GRID_WIDTH) {
        multiply_units(sums, static_cast<const PackedMatrix&>(w), words, scales, inputs);
    } else {
#pragma unroll
        for (u32 p = 0; p < 2; ++p) {
            u32 a[WARP_TILES][2][4];
#pragma unroll
            for (u32 strip = 0; strip < WARP_TILES; strip += STRIP_TILES) {
                const Ring<WIDTH> ring({words[strip], words[strip + 1]});
#pragma unroll
                for (u32 tile = 0; tile < STRIP_TILES; ++tile) {
                    u32 entries[2][2];
                    for (u32 r = 0; r < 2; ++r) ring.load_entries(entries[r], tile, r, p);
                    for (u32 upper = 0; upper < 2; ++upper) operands(a[strip + tile][upper], entries, scales[strip + tile], upper);
                }
            }
            multiply_two_chunks<ITEM_COLS>(sums, a, inputs(0) + 8 * p, inputs(1) + 8 * p);
        }
    }
}

// The scales of a unit, asked for once for all tiles, so that their loads can be under way
// together.
__device__ inline void load_all_factors(Factors (&scales)[WARP_TILES], const PackedMatrix& w, const PackedItem& work, u32 unit, u32 g) {
    switch (w.coding) {
        case PAPER: load_factors(scales, w, work, unit, g); break;
        case TWO_LEVEL_4: load_factors(scales, w, work, unit, g); break;
        default: load_factors(scales, w, work, unit, g);
    }
}
__device__ inline void load_all_factors(Factors (&scales)[WARP_TILES], const TrellisMatrix& w, const PackedItem& work, u32 unit, u32 g) {
    load_factors(scales, w, work, unit, g);
}

template <int WIDTH, class Matrix>
__device__ inline void multiply_item(Sums& sums, const Matrix& w, const PackedItem& work, const Share& share) {
    const Item& item = *work.entry;
    const u32 per_lane = lane_units(item.units);
    Factors scales[WARP_TILES];
#pragma unroll 1
    for (u32 step = 0; step < per_lane; ++step) {
        // Lanes without a unit of their own take the last: their inputs are zero.
        const u32 unit_of_lane = per_lane * share.q + step, unit = min(unit_of_lane, item.units - 1u);
        if (step == 0 || w.sub_group_log2 == 4) load_all_factors(scales, w, work, unit, share.g);
        Unit<WIDTH> words[WARP_TILES];
        switch (item.units) {
            case 8: load_units<WIDTH, 8>(words, work, unit); break;
            case 4: load_units<WIDTH, 4>(words, work, unit); break;
            default: load_units<WIDTH, 0>(words, work, unit);
        }
        multiply_units(sums, w, words, scales, [&](u32 chunk) {
            return work.inputs + input_offset<ITEM_COLS>(share.first_token + share.g, 2 * unit_of_lane + chunk);
        });
    }
}

template <class Matrix>
__device__ inline void matmul_codes(const Matmul<Matrix>& args) {
    begin_after_previous_kernel();
    DYNAMIC_SHARED(shared);
    auto& block = *reinterpret_cast<BlockWork<Matrix>*>(shared);
    Item* const entries = reinterpret_cast<Item*>(shared + WORK_BYTES);
    auto& rows = *reinterpret_cast<RowScales(*)[MATMUL_TILES][TILE_ROWS / 2]>(shared + ROWS_AT);
    block.find(args);
    const Share share;
    const Matrix& w = block.band.w;
    const u32 last_tile = tiles_of(w) - 1, first_tile = block.first_tile, items = w.item_count;
    if (threadIdx.x < min(SETS, items)) entries[threadIdx.x] = w.items[threadIdx.x];
    for (u32 tile = threadIdx.x / WARP; tile < MATMUL_TILES; tile += SETS * SET_WARPS) {
        const RowScales scales = row_scales_of(w, min(first_tile + tile, last_tile));
        if (share.q == 0) rows[tile][share.g] = scales;
    }
    __syncthreads();

    PackedItem work;
    work.slot_size = slot_bytes(w.max_width);
    work.first_tile = first_tile + share.first_tile;
    work.last_tile = last_tile;
    work.rows = rows + share.first_tile;
    const bool has_work = work.first_tile <= last_tile && blockIdx.y * MATMUL_TOKENS + share.first_token < args.m;
    const auto copy = [&](u32 i, u8* stage) {
        const Item item = entries[i % ENTRIES];
        const u32 next = i + sets_at_work(args.stages);
        if (threadIdx.x % SET_THREADS == 0 && next < items) copy16_async(&entries[next % ENTRIES], &w.items[next]);
        copy_inputs<ITEM_COLS>(args.x, args.x_stride, args.m, item.col16 * UNIT_COLS, item.units, stage);
#pragma unroll 1
        for (u32 tile = share.warp; tile < MATMUL_TILES; tile += SET_WARPS)
            copy_item(w, min(first_tile + tile, last_tile), item, stage + INPUT_BYTES<ITEM_COLS> + tile * work.slot_size);
    };
    Sums sums = {};
    for_items_of_set(share.set, items, args.stages, shared + HEAD_BYTES, INPUT_BYTES<ITEM_COLS> + MATMUL_TILES * work.slot_size, copy,
                     [&](u32 i, const u8* stage) {
                         if (!has_work) return;
                         // All bands have the same scale coding, and arguments take no registers.
                         Matrix of_band = {};
                         of_band.tile_scale_bytes = w.tile_scale_bytes;
                         of_band.coding = args.band[0].w.coding;
                         of_band.sub_group_log2 = args.band[0].w.sub_group_log2;
                         work.entry = &entries[i % ENTRIES];
                         work.inputs = stage;
                         work.slots = stage + INPUT_BYTES<ITEM_COLS> + share.first_tile * work.slot_size;
                         FOR_WIDTH(work.entry->width, multiply_item, sums, of_band, work, share);
                     });
    store_sums(sums, args, block, share, reinterpret_cast<float*>(shared + HEAD_BYTES));
}

extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, MATMUL_BLOCKS) matmul_packed(MatmulPacked args) { matmul_codes(args); }
extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, MATMUL_BLOCKS) matmul_trellis(MatmulTrellis args) { matmul_codes(args); }

// ---- dense weights ----

// A step of a tile.
constexpr u32 FRAGMENT_BYTES = 4 * STEP_WORDS;

extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, MATMUL_BLOCKS) matmul_dense(MatmulDense args) {
    begin_after_previous_kernel();
    DYNAMIC_SHARED(shared);
    auto& block = *reinterpret_cast<BlockWork<DenseMatrix>*>(shared);
    block.find(args);
    const Share share;
    const DenseMatrix& w = block.band.w;
    const u32 last_tile = tiles_of(w) - 1, first_tile = block.first_tile, steps = w.steps;
    const bool has_work = first_tile + share.first_tile <= last_tile && blockIdx.y * MATMUL_TOKENS + share.first_token < args.m;
    const auto copy = [&](u32 step, u8* stage) {
        copy_inputs<STEP_COLS>(args.x, args.x_stride, args.m, step * STEP_COLS, STEP_COLS / UNIT_COLS, stage);
        u8* to = stage + INPUT_BYTES<STEP_COLS> + threadIdx.x % SET_THREADS * 16;
        const u32* fragments = w.fragments + threadIdx.x % SET_THREADS * 4;
        // The threads of a set copy a tile's step at a time, 16 bytes each.
#pragma unroll
        for (u32 tile = 0; tile < MATMUL_TILES; ++tile) {
            const u64 at = u64(min(first_tile + tile, last_tile)) * steps + step;
            copy16_async(to + tile * FRAGMENT_BYTES, fragments + at * STEP_WORDS);
        }
    };
    static_assert(SET_THREADS * 16 == FRAGMENT_BYTES, "");
    Sums sums = {};
    for_items_of_set(share.set, steps, args.stages, shared + HEAD_BYTES, INPUT_BYTES<STEP_COLS> + MATMUL_TILES * FRAGMENT_BYTES, copy,
                     [&](u32, const u8* stage) {
                         if (!has_work) return;
                         const u8* fragments = stage + INPUT_BYTES<STEP_COLS> + share.first_tile * FRAGMENT_BYTES + share.lane * 16;
#pragma unroll
                         for (u32 half = 0; half < 2; ++half) {
                             u32 a[WARP_TILES][2][4];
#pragma unroll
                             for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
                                 for (u32 i = 0; i < 2; ++i) {
                                     const Vector16 words = load16(fragments + tile * FRAGMENT_BYTES + (2 * half + i) * WARP * 16);
#pragma unroll
                                     for (u32 k = 0; k < 4; ++k) a[tile][i][k] = words.word[k];
                                 }
                             multiply_chunk<STEP_COLS>(sums, a, stage + input_offset<STEP_COLS>(share.first_token + share.g, 2 * share.q + half));
                         }
                     });
    store_sums(sums, args, block, share, reinterpret_cast<float*>(shared + HEAD_BYTES));
}
