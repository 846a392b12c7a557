// x[t] = scale * row tokens[t] of a matrix, which may be in bands: the embeddings of m tokens. Or
// x[t] += row first + position + t: those of their positions.
//
// Packed weights are read byte by byte, the way docs/format.md words it: it is only one row per
// token. They equal the CPU's to the last bit.
//
//   w         [rows, cols]
//   tokens    u32 [m]
//   position  null, or one u32 in place of tokens: where the first of the m tokens stands
//   x         f32 [m, cols]; the row of a token without a row of w becomes NaN
//
// Grid: packed (items of the band that has most, m), dense (ceil(cols / 128), m). Block: 128
// threads, one column each. No dynamic shared memory. m <= 65535.

#include "bands.cuh"

constexpr u32 EMBED_COLS = ITEM_COLS;

template <class Matrix>
struct Embed {
    Band<Matrix> band[MAX_BANDS];  // their `out` is x
    const u32* tokens;
    const u32* position;
    u32 first;
    u32 bands;
    float scale;
    u32 unused;
};

// The row that token `blockIdx.y` looks up.
template <class Matrix>
__device__ inline u32 row_of_token(const Embed<Matrix>& args) {
    return args.position != nullptr ? args.first + *args.position + blockIdx.y : args.tokens[blockIdx.y];
}

template <class Matrix>
__device__ inline void store_embedding(const Embed<Matrix>& args, float* x, float weight) {
    *x = args.position != nullptr ? *x + weight : args.scale * weight;
}

// The band that has row `row`; the last one if none has it.
template <class Matrix>
__device__ inline const Band<Matrix>& band_of(const Embed<Matrix>& args, u32 row) {
    u32 i = args.bands - 1;
    while (row < args.band[i].first_row) i--;
    return args.band[i];
}

// The code in row `row` of a tile, column `col` of an item (F10 to F13). `plane`: the first plane
// of the item's group.
__device__ inline u32 code_at(const u8* plane, const Item& item, u32 row, u32 col) {
    const u32 group_cols = item.group16 * UNIT_COLS, group_col = item.start16 * UNIT_COLS + col;
    u32 code = 0, low = 0;
    for (u32 bits = 8; bits > 0; bits /= 2) {
        if (!(item.width & bits)) continue;
        const u32 block_cols = 32 / bits, block = group_col / block_cols, j = group_col % block_cols;
        const bool is_short = group_cols - block * block_cols < block_cols;
        const u32 byte = plane[block * 64 + (is_short ? 2 * row + j % 4 / 2 : 4 * row + j % 4)];
        const u32 shift = is_short ? 4 * (j % 2) + j / 4 : bits * (j / 4);
        code |= (byte >> shift & ((1u << bits) - 1)) << low;
        low += bits;
        plane += 2 * bits * group_cols;
    }
    return code;
}

// F14 and F15.
__device__ inline StoredScale two_level_scale(const u8* record, bool has_high_bits, u32 row) {
    u32 s = record[row] & 15, z = record[row] >> 4;
    if (has_high_bits) {
        const u32 high = record[TILE_ROWS + row % 8] >> (4 * (row / 8));
        s |= (high & 3) << 4;
        z |= (high >> 2 & 3) << 4;
    }
    return {float(s), -float(z)};
}

// The same of a trellis. Its codes say their values together (F24 to F26).
__device__ inline float weight_at(const TrellisMatrix& w, const Item& item, u32 row, u32 col) {
    const u32 first_tile = row / TILE_ROWS / STRIP_TILES * STRIP_TILES, row_of_tile = row % TILE_ROWS;
    const auto code = [&](u32 row_of_strip) {
        const u8* tile = w.codes + u64(first_tile + row_of_strip / TILE_ROWS) * w.tile_code_bytes;
        return code_at(tile + item.codes, item, row_of_strip % TILE_ROWS, col);
    };
    const u64 tile = row / TILE_ROWS;
    const u8* record = w.scales + tile * w.tile_scale_bytes + item.scales + (col >> w.sub_group_log2) * TRELLIS_RECORD_BYTES;
    const float s = float(record[row_of_tile % 8] >> row_of_tile / 8 * 4 & 15);
    u32 row_of_strip = row % (STRIP_TILES * TILE_ROWS), window = 0;
    for (u32 bit = 0; bit < 8; bit += item.width, row_of_strip = next_in_ring(row_of_strip)) window |= code(row_of_strip) << bit;
    const float value = value_of_window(item.width, window & 255);
    return rounded_product(rounded_product(half_to_float(w.row_scales[tile * TILE_ROWS + row_of_tile]), s), value);
}

// The weight in row `row`, column `col` of an item.
__device__ inline float weight_at(const PackedMatrix& w, const Item& item, u32 row, u32 col) {
    const u64 tile = row / TILE_ROWS;
    row %= TILE_ROWS;
    const float code = float(code_at(w.codes + tile * w.tile_code_bytes + item.codes, item, row, col));
    const u8* records = w.scales + tile * w.tile_scale_bytes + item.scales;
    if (w.coding == PAPER) {
        const StoredScale scale = paper_scale(records, item.width, row);
        return rounded_product(scale.factor, code) + scale.offset;
    }
    const u8* record = records + (col >> w.sub_group_log2) * record_bytes(w.coding, item.width);
    const StoredScale scale = two_level_scale(record, w.coding == TWO_LEVEL_6, row);
    const u16* d = w.row_scales + tile * 2 * TILE_ROWS + row;
    const u16* m = d + TILE_ROWS;
    const float factor = rounded_product(half_to_float(*d), scale.factor);
    return rounded_product(factor, code) + rounded_product(half_to_float(*m), scale.offset);
}

template <class Matrix>
__device__ inline void embed_codes(const Embed<Matrix>& args) {
    begin_after_previous_kernel();
    const u32 token = row_of_token(args);
    const Band<Matrix>& band = band_of(args, token);
    const Matrix& w = band.w;
    if (blockIdx.x >= w.item_count) return;
    const Item item = w.items[blockIdx.x];
    const u32 col = threadIdx.x, row = token - band.first_row;
    // The last unit may have padding columns (F21).
    if (col >= min(u32(item.units * UNIT_COLS), w.cols - item.col16 * UNIT_COLS)) return;
    float* x = band.out + u64(blockIdx.y) * w.cols + item.col16 * UNIT_COLS;
    store_embedding(args, x + col, row < w.rows ? weight_at(w, item, row, col) : nanf(""));
}

extern "C" __global__ void __launch_bounds__(EMBED_COLS) embed_packed(Embed<PackedMatrix> args) { embed_codes(args); }
extern "C" __global__ void __launch_bounds__(EMBED_COLS) embed_trellis(Embed<TrellisMatrix> args) { embed_codes(args); }

// The weight in row `row`, column `col`: `fragment` of dense.cuh, one number of it.
__device__ inline float weight_at(const DenseMatrix& w, u32 row, u32 col) {
    const u32 row_of_tile = row % TILE_ROWS, col_of_unit = col % UNIT_COLS;
    const u32 t = col_of_unit / 4, lane = row_of_tile / 2 * 4 + col % STEP_COLS / UNIT_COLS;
    const u32 word = col_of_unit % 2 * 2 + row_of_tile % 2, is_high = col_of_unit / 2 % 2;
    const u32* step = w.fragments + (u64(row / TILE_ROWS) * w.steps + col / STEP_COLS) * STEP_WORDS;
    return half_to_float(u16(step[(t * WARP + lane) * 4 + word] >> (16 * is_high)));
}

extern "C" __global__ void __launch_bounds__(EMBED_COLS) embed_dense(Embed<DenseMatrix> args) {
    begin_after_previous_kernel();
    const u32 token = row_of_token(args);
    const Band<DenseMatrix>& band = band_of(args, token);
    const DenseMatrix& w = band.w;
    const u32 col = blockIdx.x * EMBED_COLS + threadIdx.x, row = token - band.first_row;
    if (col >= w.cols) return;
    float* x = band.out + u64(blockIdx.y) * w.cols;
    store_embedding(args, x + col, row < w.rows ? weight_at(w, row, col) : nanf(""));
}
