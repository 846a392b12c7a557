// Products of one token with layers whose codes can be multiplied as they are (`matvec.cuh`,
// `raw.cuh`). Every warp has a ring of `depth` quads in shared memory, which copies fill long
// before their turn; it shares it with no other warp.
//
// Dynamic shared memory: RawInputs::bytes(cols) + MATVEC_WARPS * depth * quad_bytes. m is 1; cols
// are the same for all bands.

#include "matvec.cuh"
#include "raw.cuh"

// The quads of a warp, one after the other, in its slots of shared memory: a lane's part of them.
struct QuadRing {
    u8* shared;
    u32 slot, first, end, bytes, slots;  // of the quad whose turn it is, of the ring, of a slot

    // Of the tile: the lane's chunk of a row, and its record; its quarter's place in the table.
    const u8 *codes, *scales;
    const u8* table;
    u32 offset, step, last;  // in the table, of the quad that is to be fetched
    Vector16 next;           // the entry fetched before

    u32 quarter;
    u32 chunk, record;  // where they go in a slot
    bool has_record;

    __device__ QuadRing(const PackedMatrix& w, u32 tile, u32 warp, u32 warps, u8* shared, u32 first, u32 slots, u32 slot_bytes)
        : shared(shared), slot(first), first(first), end(first + slots * slot_bytes), bytes(slot_bytes), slots(slots) {
        constexpr u32 QUAD = QUARTERS * u32(sizeof(Quarter));
        const u32 i = threadIdx.x % 8;
        quarter = threadIdx.x % WARP / 8;
        codes = kept(w.codes + u64(tile) * w.tile_code_bytes + 16 * i);
        scales = kept(w.scales + u64(tile) * w.tile_scale_bytes + 16 * i);
        table = reinterpret_cast<const u8*>(w.quads + quarter);
        step = warps * QUAD;
        last = w.quad_count * QUAD;
        offset = min(warp * QUAD, last);
        chunk = QUAD_ROWS_AT + quarter * ROW_BYTES + 16 * row_chunk(i, quarter);
        record = QUAD_RECORDS_AT + (quarter * (QUARTER_COLS / RUN_COLS) + i) * TILE_ROWS;
        has_record = i < QUARTER_COLS >> w.sub_group_log2;
        // The table is asked for all of them before the first is waited for.
        const Vector16 ahead[3] = {fetch(), fetch(), fetch()};
        next = ahead[2];
        fill<8>(ahead[0]);
        fill<8>(ahead[1]);
        if (slots == 3) refill<8>();
    }

    __device__ const u8* quad() const { return shared + slot; }
    __device__ u32* entries() const { return reinterpret_cast<u32*>(shared + slot); }

    // Whether the quad whose turn it is has that width; it is no wider. Behind the last come some
    // without any.
    __device__ bool has_width(u32 width) const { return entries()[0] >= width << 16; }
    __device__ u32 col64() const { return entries()[quarter] & 0xffff; }

    __device__ Vector16 fetch() {
        const Vector16 entry = load16(table + offset);
        offset = min(offset + step, last);
        return entry;
    }

    template <int BITS>
    __device__ void copy_plane(u32 rows, u32 from) const {
#pragma unroll
        for (u32 row = 0; row < BITS; ++row)
            copy16_async(shared + rows + ROW_STEP * place_of_row(row, BITS), codes + from + ROW_BYTES * row);
    }

    // Has the next quad, which is no wider than MAX_WIDTH, copied to where one was whose turn is
    // over.
    template <int MAX_WIDTH>
    __device__ void refill() {
        fill<MAX_WIDTH>(next);
        next = fetch();
    }

    template <int MAX_WIDTH>
    __device__ void fill(const Vector16& entry) {
        const u32 width = entry.word[3] >> 16;
        entries()[quarter] = entry.word[3];
        if (has_record) copy16_async(shared + slot + record, scales + entry.word[2]);
        u32 rows = slot + chunk, from_at = entry.word[0], plane_step = entry.word[1];
        if (MAX_WIDTH >= 8 && width & 8) copy_plane<8>(rows, from_at);
        if (MAX_WIDTH >= 4 && width & 4) {
            copy_plane<4>(rows, from_at);
            rows += 4 * ROW_STEP;
            from_at += plane_step;
            plane_step /= 2;
        }
        if (MAX_WIDTH >= 2 && width & 2) {
            copy_plane<2>(rows, from_at);
            rows += 2 * ROW_STEP;
            from_at += plane_step;
        }
        if (width & 1) copy_plane<1>(rows, from_at);
        copy_async_commit();
        slot += bytes;
        if (slot == end) slot = first;
    }

    // Until nothing is under way any more: a block must not end before.
    __device__ void drain() const { copy_async_wait<0>(); }

    // Until the quad is there whose turn it is.
    __device__ void wait() const {
        copy_async_wait_but(slots - 1);
        __syncwarp();
    }
};

template <int WIDTH>
__device__ inline void multiply_quads(RawSums& sums, QuadRing& ring, const RawLane& lane) {
    while (ring.has_width(WIDTH)) {
        ring.wait();
        multiply_quad<WIDTH>(sums, lane, ring.quad(), ring.col64());
        __syncwarp();
        ring.refill<WIDTH>();
    }
}

extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 2) matvec_raw(MatvecPacked args) {
    let_next_kernel_start();
    DYNAMIC_SHARED(shared);
    __shared__ float partial[MATVEC_WARPS][TILE_ROWS][1];
    const u32 warp = threadIdx.x / WARP, q = threadIdx.x % 4;
    const BlockTile block(args);
    const PackedMatrix& w = args.band[block.band_of_warp()].w;
    const RawInputs inputs(shared, w.cols);
    const u32 first_slot = RawInputs::bytes(w.cols) + warp * args.depth * args.quad_bytes;
    QuadRing ring(w, block.tile, warp % block.warps, block.warps, shared, first_slot, args.depth, args.quad_bytes);
    block.prefetch_ends(args);
    const RowScales rows = row_scales_of(w, block.tile);
    wait_for_previous_kernel();
    inputs.stage(args.x, w.cols);
    __syncthreads();

    const RawLane lane(inputs, w.cols, w.sub_group_log2);
    RawSums sums = {};
    multiply_quads<8>(sums, ring, lane);
    multiply_quads<7>(sums, ring, lane);
    multiply_quads<6>(sums, ring, lane);
    multiply_quads<5>(sums, ring, lane);
    multiply_quads<4>(sums, ring, lane);
    multiply_quads<3>(sums, ring, lane);
    multiply_quads<2>(sums, ring, lane);
    multiply_quads<1>(sums, ring, lane);
    ring.drain();
    const Output<TILE_ROWS, 1> output(args, block);
    for (u32 r = 0; r < 2; ++r) {
        const float sum = sums.of_row(r, rows);
        if (q == 0) partial[warp][threadIdx.x % WARP / 4 * 2 + r][0] = sum;
    }
    __syncthreads();
    output.store(args, block, partial);
    norm_outputs(args);
}
