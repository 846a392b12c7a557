// Products of 1 to 8 tokens with any weights (`matvec.cuh`). No dynamic shared memory.

#include "strip.cuh"

template <class Matrix>
__device__ inline void matvec(const Matvec<Matrix>& args) {
    constexpr u32 TILES = TILES_OF_STRIP<Matrix>;
    let_next_kernel_start();
    __shared__ float partial[MATVEC_WARPS][TILES * TILE_ROWS][MATVEC_TOKENS];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const BlockTile block(args);

    LaneSums sums[TILES] = {};
    multiply_strip(sums, args.band[block.band_of_warp()].w, block.tile, inputs_of_lane(args), warp % block.warps, block.warps);
    const Output<TILES * TILE_ROWS, MATVEC_TOKENS> output(args, block);
    for (u32 tile = 0; tile < TILES; ++tile)
        for (u32 i = 0; i < 4; ++i)
            partial[warp][tile * TILE_ROWS + lane / 4 * 2 + i / 2][lane % 4 * 2 + i % 2] = sums[tile][0][i] + sums[tile][1][i];
    __syncthreads();
    output.store(args, block, partial);
    norm_outputs(args);
}

extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 3) matvec_packed(MatvecPacked args) { matvec(args); }
extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 2) matvec_trellis(MatvecTrellis args) { matvec(args); }
extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 3) matvec_dense(MatvecDense args) { matvec(args); }
