// An item of a packed layer in shared memory, and a lane's words of it (packed.cuh).
#pragma once

#include "packed.cuh"

// Most items have 8 units, or 4 in groups of 64 columns. Functions of `UNITS` have code of their
// own for these; 0 takes any.

template <u32 UNITS>
__device__ inline u32 units_of(const Item& item) {
    return UNITS != 0 ? UNITS : item.units;
}

// What one item takes: its planes one after the other, then its scale records from the last 16-byte
// boundary before them.
constexpr u32 SCALE_SLOT_BYTES = 256;
__device__ inline u32 slot_bytes(u32 max_width) { return max_width * 2 * ITEM_COLS + SCALE_SLOT_BYTES; }

__device__ constexpr u32 log2_of(u32 bits) { return bits == 8 ? 3 : bits == 4 ? 2 : bits == 2 ? 1 : 0; }

// Where chunk `chunk` (16 bytes) of a plane lies in a slot. In the plane's own order the lanes q =
// 0..3 would read from places a multiple of 128 bytes apart, the same banks.
template <u32 BITS>
__device__ inline u32 slot_chunk(u32 chunk, u32 units) {
    const u32 log2_chunks_per_lane = max(log2_of(BITS) + lane_units(units), 2u);
    const u32 swap = units % 4 == 0 ? (chunk >> log2_chunks_per_lane & 3) << 1 : 0;
    return chunk ^ swap;
}

template <u32 BITS, u32 UNITS>
__device__ inline void copy_plane(const u8*& plane, u8*& slot, const Item& item) {
    if (!(item.width & BITS)) return;
    const u8* from = plane + 2 * BITS * UNIT_COLS * item.start16;
    const u32 units = units_of<UNITS>(item), chunks = 2 * BITS * units;
#pragma unroll
    for (u32 first = 0; first < 2 * BITS * ITEM_COLS / UNIT_COLS; first += WARP) {
        const u32 i = first + threadIdx.x % WARP;
        if (i < chunks) copy16_async(slot + 16 * slot_chunk<BITS>(i, units), from + 16 * i);
    }
    plane += 2 * BITS * UNIT_COLS * item.group16;
    slot += 16 * chunks;
}

// Starts to copy an item of a tile to `slot` (16-byte aligned). The whole warp must call; a commit
// must follow.
template <u32 UNITS>
__device__ inline void copy_item(const PackedMatrix& w, u32 tile, const Item& item, u8* slot) {
    const u8* plane = w.codes + u64(tile) * w.tile_code_bytes + item.codes;
    copy_plane<8, UNITS>(plane, slot, item);
    copy_plane<4, UNITS>(plane, slot, item);
    copy_plane<2, UNITS>(plane, slot, item);
    copy_plane<1, UNITS>(plane, slot, item);
    const u32 lane = threadIdx.x % WARP;
    const u32 runs = w.coding == PAPER ? 1 : (((units_of<UNITS>(item) * UNIT_COLS - 1) >> w.sub_group_log2) + 1);
    const u64 first = u64(tile) * w.tile_scale_bytes + item.scales;
    const u32 bytes = u32(first & 15) + runs * record_bytes(w.coding, item.width);
    if (16 * lane < bytes) copy16_async(slot + 16 * lane, w.scales + (first & ~u64(15)) + 16 * lane);
}

__device__ inline void copy_item(const PackedMatrix& w, u32 tile, const Item& item, u8* slot) {
    switch (item.units) {
        case 8: copy_item<8>(w, tile, item, slot); break;
        case 4: copy_item<4>(w, tile, item, slot); break;
        default: copy_item<0>(w, tile, item, slot);
    }
}

// The scale records of an item that `copy_item` brought to `slot`.
__device__ inline const u8* records_of(const PackedMatrix& w, u32 tile, const Item& item, const u8* slot) {
    return slot + 2 * item.width * UNIT_COLS * item.units + ((tile * w.tile_scale_bytes + item.scales) & 15);
}

// The planes of an item of so many units there: what `Unit::load` reads from.
template <u32 UNITS>
struct SlotPlanes {
    const u8* slot;
    u32 units;

    __device__ SlotPlanes(const u8* slot, const Item& item) : slot(slot), units(units_of<UNITS>(item)) {}

    __device__ const u8* plane(u32 bits_before) const { return slot + 2 * bits_before * UNIT_COLS * units; }

    __device__ bool is_short(u32 unit) const { return UNITS == 0 && unit % 2 == 0 && unit + 1 == units; }

    template <u32 BITS>
    __device__ void load_rows(u32 (&words)[2], u32 bits_before, u32 block) const {
        const u32 g = threadIdx.x % WARP / 4;
        load_pair(words, plane(bits_before) + 16 * slot_chunk<BITS>(4 * block + g / 2, units) + g % 2 * 8);
    }
};
